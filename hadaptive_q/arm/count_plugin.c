/* A QEMU TCG plugin that counts by class the AArch64 instructions executed between two marks of the runner.
 *
 *   qemu-aarch64 -plugin count_plugin.so,out=FILE ...
 *
 * FILE gets one JSON line when the guest ends:
 *   {"threads": n, "classes": ["dot", ...], "cuts": [[mark, n, ...], ...]}
 * A cut holds the sums by class since mark 1, taken at every mark (see tracer.h) up to mark 2. Instructions are summed
 * when a translated block is entered: in user mode only a fault leaves a block early, and a fault ends the guest.
 * System calls end a block, so every cut is exact.
 */
#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The part of the plugin interface that is used here; no package of the emulator brings the header. */
typedef uint64_t plugin_id;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
typedef void translate_callback(plugin_id, struct qemu_plugin_tb *);
typedef void enter_callback(unsigned, void *);
typedef void syscall_callback(plugin_id, unsigned, int64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                              uint64_t, uint64_t);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *tb, size_t index);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *insn);
void qemu_plugin_register_vcpu_init_cb(plugin_id id, void (*callback)(plugin_id, unsigned));
void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id id, translate_callback *callback);
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *tb, enter_callback *callback, int flags, void *data);
void qemu_plugin_register_vcpu_syscall_cb(plugin_id id, syscall_callback *callback);
void qemu_plugin_register_atexit_cb(plugin_id id, void (*callback)(plugin_id, void *), void *data);

/* The interface's number: the emulator refuses a plugin that was written for another one. */
int qemu_plugin_version = 1;

enum { MARKER = 0x4851, BEGIN = 1, END = 2, NO_REGISTERS = 0 };
enum class { DOT, SIMD, MEMORY, INTEGER, BRANCH, OTHER, CLASSES };
static const char *const names[CLASSES] = {"dot", "simd", "memory", "integer", "branch", "other"};

struct block {
    uint32_t instructions[CLASSES];
};

struct cut {
    uint64_t mark;
    uint64_t sums[CLASSES];
};

static bool counting;
static unsigned threads;
static uint64_t sums[CLASSES];
static struct cut *cuts;
static size_t cut_count, cut_room;
static const char *out;

/* SDOT, UDOT, USDOT, SUDOT on vectors and on one element; SMMLA, UMMLA, USMMLA. */
static bool is_dot(uint32_t word) {
    return (word & 0x9FE0FC00) == 0x0E809400    /* SDOT, UDOT, vector */
           || (word & 0xBFE0FC00) == 0x0E809C00 /* USDOT, vector */
           || (word & 0x9FC0F400) == 0x0F80E000 /* SDOT, UDOT, element */
           || (word & 0xBF40F400) == 0x0F00F000 /* USDOT, SUDOT, element */
           || (word & 0xDFE0FC00) == 0x4E80A400 /* SMMLA, UMMLA */
           || (word & 0xFFE0FC00) == 0x4E80AC00 /* USMMLA */;
}

/* The class of an A64 instruction, by its main encoding group (bits 28 to 25). Exported for the tests. */
int classify(uint32_t word) {
    const uint32_t group = word >> 25 & 15;
    const bool system = word >> 25 == 0x6A;                    /* exceptions, barriers, hints, system registers */
    if ((group & 5) == 4) return MEMORY;                       /* x1x0: loads, stores, prefetches, atomics */
    if ((group & 7) == 7) return is_dot(word) ? DOT : SIMD;    /* x111: vectors and floating point */
    if ((group & 14) == 8 || (group & 7) == 5) return INTEGER; /* 100x with an immediate, x101 with registers */
    if ((group & 14) == 10) return system ? OTHER : BRANCH;    /* 101x */
    return OTHER;                                              /* scalable vectors, unallocated */
}

static void enter_block(unsigned vcpu, void *data) {
    (void)vcpu;
    const struct block *block = data;
    for (int kind = 0; counting && kind < CLASSES; ++kind) sums[kind] += block->instructions[kind];
}

static void translate(plugin_id id, struct qemu_plugin_tb *tb) {
    (void)id;
    struct block *block = calloc(1, sizeof *block);
    if (block == NULL) abort();
    for (size_t i = 0; i < qemu_plugin_tb_n_insns(tb); ++i) {
        uint32_t word;
        memcpy(&word, qemu_plugin_insn_data(qemu_plugin_tb_get_insn(tb, i)), sizeof word);
        block->instructions[classify(word)]++;
    }
    qemu_plugin_register_vcpu_tb_exec_cb(tb, enter_block, NO_REGISTERS, block);
}

static void count_thread(plugin_id id, unsigned vcpu) {
    (void)id, (void)vcpu;
    threads++;
}

static void system_call(plugin_id id, unsigned vcpu, int64_t number, uint64_t a1, uint64_t a2, uint64_t a3, uint64_t a4,
                        uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8) {
    (void)id, (void)vcpu, (void)a2, (void)a3, (void)a4, (void)a5, (void)a6, (void)a7, (void)a8;
    if (number != MARKER) return;
    if (a1 == BEGIN) counting = true;
    if (!counting) return;
    if (cut_count == cut_room) {
        cut_room = 2 * cut_room + 64;
        cuts = realloc(cuts, cut_room * sizeof *cuts);
        if (cuts == NULL) abort();
    }
    cuts[cut_count].mark = a1;
    memcpy(cuts[cut_count++].sums, sums, sizeof sums);
    if (a1 == END) counting = false;
}

static void print(plugin_id id, void *data) {
    (void)id, (void)data;
    FILE *file = fopen(out, "w");
    if (file == NULL) {
        perror("count_plugin: cannot write its output");
        return;
    }
    fprintf(file, "{\"threads\": %u, \"classes\": [", threads);
    for (int kind = 0; kind < CLASSES; ++kind) fprintf(file, "%s\"%s\"", kind ? ", " : "", names[kind]);
    fprintf(file, "], \"cuts\": [");
    for (size_t i = 0; i < cut_count; ++i) {
        fprintf(file, "%s[%" PRIu64, i ? ", " : "", cuts[i].mark);
        for (int kind = 0; kind < CLASSES; ++kind) fprintf(file, ", %" PRIu64, cuts[i].sums[kind]);
        fprintf(file, "]");
    }
    fprintf(file, "]}\n");
    fclose(file);
}

int qemu_plugin_install(plugin_id id, const void *info, int argc, char **argv) {
    (void)info;
    for (int i = 0; i < argc; ++i) {
        if (strncmp(argv[i], "out=", 4) == 0) out = argv[i] + 4;
    }
    if (out == NULL) {
        fprintf(stderr, "count_plugin: needs out=FILE\n");
        return -1;
    }
    qemu_plugin_register_vcpu_init_cb(id, count_thread);
    qemu_plugin_register_vcpu_tb_trans_cb(id, translate);
    qemu_plugin_register_vcpu_syscall_cb(id, system_call);
    qemu_plugin_register_atexit_cb(id, print, NULL);
    return 0;
}
