// Runs a .pte on an ARM64 core, one thread, with the stock ExecuTorch runtime.
//
//   runner run PTE INPUTS OUTPUTS   every sample in INPUTS -> one float32 output after another in OUTPUTS
//   runner count PTE N [INPUTS]     N inferences of the first sample; the last one stands between the marker system calls
//
// INPUTS holds raw samples, each the bytes of all inputs of `forward` one after the other. Without INPUTS a sample is made up (see `pseudo_random`).
// Standard output tells where the libraries lie, `library ADDRESS PATH`, and what the method takes, `input TYPE SIZE...`.
// A refusal is one line on standard error that starts with "runner: ", and exit code 1.

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor_ptr.h>
#include <executorch/extension/threadpool/threadpool_guard.h>
#include <executorch/runtime/platform/runtime.h>

#include <link.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

using executorch::aten::ScalarType;
using executorch::extension::TensorPtr;
using executorch::extension::module::Module;
using executorch::runtime::Error;
using executorch::runtime::Method;
using executorch::runtime::Program;

namespace {

[[noreturn]] void refuse(const std::string& line) {
  std::fprintf(stderr, "runner: %s\n", line.c_str());
  std::exit(1);
}

void check(Error error, const std::string& what) {
  if (error != Error::Ok) refuse(what + ": " + executorch::runtime::to_string(error));
}

// No Linux system call has this number: the kernel refuses it, and the plugin sees it pass. Inline, so that no library code is counted.
inline void marker(long first) {
  register long number asm("x8") = 0x4851;
  register long argument asm("x0") = first;
  asm volatile("svc #0" : "+r"(argument) : "r"(number) : "memory");
}

std::vector<char> read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) refuse(std::string("cannot read ") + path);
  return std::vector<char>(std::istreambuf_iterator<char>(file), {});
}

// state = 1664525 state + 1013904223 (mod 2^32), from 1. A float is (state >> 8) / 2^23 - 1, in [-1, 1); a byte is state >> 24; other types are 0,
// because a random integer may be an index out of range.
void pseudo_random(ScalarType type, char* data, size_t bytes, uint32_t& state) {
  const size_t width = type == ScalarType::Float ? sizeof(float) : 1;
  const bool drawn = width > 1 || type == ScalarType::Byte;
  for (size_t at = 0; drawn && at + width <= bytes; at += width) {
    state = 1664525u * state + 1013904223u;
    const float real = static_cast<float>(state >> 8) / 8388608.0f - 1.0f;
    const uint8_t byte = static_cast<uint8_t>(state >> 24);
    std::memcpy(data + at, width > 1 ? static_cast<const void*>(&real) : &byte, width);
  }
}

int print_library(dl_phdr_info* info, size_t, void*) {
  if (info->dlpi_name[0] != '\0') std::printf("library %#lx %s\n", static_cast<unsigned long>(info->dlpi_addr), info->dlpi_name);
  return 0;
}

struct Input {
  TensorPtr tensor;
  size_t bytes;
};

// The tensors of `forward`, each over memory of its own; prints their types and sizes.
std::vector<Input> prepare_inputs(const Method& method, std::vector<std::vector<char>>& memory) {
  std::vector<Input> inputs;
  const auto meta = method.method_meta();
  for (size_t i = 0; i < meta.num_inputs(); ++i) {
    const auto info = meta.input_tensor_meta(i);
    if (!info.ok()) refuse("input " + std::to_string(i) + " of forward is no tensor");
    const std::vector<executorch::aten::SizesType> sizes(info->sizes().begin(), info->sizes().end());
    std::printf("input %s", executorch::runtime::toString(info->scalar_type()));
    for (const auto size : sizes) std::printf(" %d", static_cast<int>(size));
    std::printf("\n");
    memory.emplace_back(info->nbytes());
    const std::vector<executorch::aten::DimOrderType> order(info->dim_order().begin(), info->dim_order().end());
    inputs.push_back({executorch::extension::make_tensor_ptr(sizes, memory.back().data(), order, {}, info->scalar_type()), info->nbytes()});
  }
  return inputs;
}

void infer(Method& method, bool marked) {
  if (marked) marker(1);
  const Error error = method.execute();
  if (marked) marker(2);
  check(error, "the runtime fails in execute()");
}

void write_outputs(const Method& method, std::ofstream& file) {
  for (size_t i = 0; i < method.outputs_size(); ++i) {
    const auto& value = method.get_output(i);
    if (!value.isTensor() || value.toTensor().scalar_type() != ScalarType::Float) refuse("output " + std::to_string(i) + " is no float32 tensor");
    file.write(static_cast<const char*>(value.toTensor().const_data_ptr()), value.toTensor().nbytes());
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (!(mode == "run" && argc == 5) && !(mode == "count" && (argc == 4 || argc == 5))) refuse("usage: run PTE INPUTS OUTPUTS | count PTE N [INPUTS]");
  const char* input_path = mode == "run" ? argv[3] : argc == 5 ? argv[4] : nullptr;

  executorch::runtime::runtime_init();
  executorch::extension::threadpool::NoThreadPoolGuard single_thread;
  Module module(argv[2]);
  check(module.load(Program::Verification::InternalConsistency), "the runtime cannot load the file");
  check(module.load_forward(), "the runtime cannot load method forward");
  Method& method = *module.method("forward").get();

  dl_iterate_phdr(print_library, nullptr);
  std::vector<std::vector<char>> memory;
  const std::vector<Input> inputs = prepare_inputs(method, memory);
  size_t bytes = 0;
  for (const Input& input : inputs) bytes += input.bytes;
  std::vector<char> samples(bytes);
  uint32_t state = 1;
  size_t offset = 0;
  for (const Input& input : inputs) {
    pseudo_random(input.tensor->scalar_type(), samples.data() + offset, input.bytes, state);
    offset += input.bytes;
  }
  if (input_path != nullptr) samples = read(input_path);
  if (bytes == 0 || samples.empty() || samples.size() % bytes != 0) {
    refuse("the inputs hold " + std::to_string(samples.size()) + " bytes, not a multiple of the " + std::to_string(bytes) + " bytes of one sample");
  }

  const size_t inferences = mode == "run" ? samples.size() / bytes : std::strtoul(argv[3], nullptr, 10);
  if (inferences == 0) refuse("N must be a positive number");
  std::ofstream outputs(mode == "run" ? argv[4] : "/dev/null", std::ios::binary);
  for (size_t n = 0; n < inferences; ++n) {
    const char* sample = samples.data() + (mode == "run" ? n * bytes : 0);
    for (size_t i = 0; i < inputs.size(); ++i) {
      std::memcpy(memory[i].data(), sample, inputs[i].bytes);
      sample += inputs[i].bytes;
      check(method.set_input(inputs[i].tensor, i), "the runtime refuses input " + std::to_string(i));
    }
    infer(method, mode == "count" && n + 1 == inferences);
    if (mode == "run") write_outputs(method, outputs);
  }
  outputs.flush();
  if (!outputs) refuse("cannot write the outputs");
  return 0;
}
