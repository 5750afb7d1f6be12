"""The plugin's decoder on assembled instructions."""

from __future__ import annotations

import ctypes
import os

import pytest

from hadaptive_q.arm.build import Build

CLASSES = ["dot", "simd", "memory", "integer", "branch", "other"]
WORDS = [
    (0x4E829420, "dot", "sdot v0.4s, v1.16b, v2.16b"),
    (0x4FA2E820, "dot", "sdot v0.4s, v1.16b, v2.4b[3]"),
    (0x2E829420, "dot", "udot v0.2s, v1.8b, v2.8b"),
    (0x6F9FE03F, "dot", "udot v31.4s, v1.16b, v31.4b[0]"),
    (0x4E829C20, "dot", "usdot v0.4s, v1.16b, v2.16b"),
    (0x4FA2F020, "dot", "usdot v0.4s, v1.16b, v2.4b[1]"),
    (0x4F22F020, "dot", "sudot v0.4s, v1.16b, v2.4b[1]"),
    (0x4E82A420, "dot", "smmla v0.4s, v1.16b, v2.16b"),
    (0x6E82A420, "dot", "ummla v0.4s, v1.16b, v2.16b"),
    (0x4E82AC20, "dot", "usmmla v0.4s, v1.16b, v2.16b"),
    (0x6E42FC20, "simd", "bfdot v0.4s, v1.8h, v2.8h"),
    (0x6E42EC20, "simd", "bfmmla v0.4s, v1.8h, v2.8h"),
    (0x4F62F020, "simd", "bfdot v0.4s, v1.8h, v2.2h[1]"),
    (0x4F821020, "simd", "fmla v0.4s, v1.4s, v2.s[0]"),
    (0x0E628020, "simd", "smlal v0.4s, v1.4h, v2.4h"),
    (0x1F020C20, "simd", "fmadd s0, s1, s2, s3"),
    (0x4E020020, "simd", "tbl v0.16b, {v1.16b}, v2.16b"),
    (0x0E0C3C20, "simd", "umov w0, v1.s[1]"),
    (0x3DC00020, "memory", "ldr q0, [x1]"),
    (0xB9400020, "memory", "ldr w0, [x1]"),
    (0xAD000440, "memory", "stp q0, q1, [x2]"),
    (0x4CDF7020, "memory", "ld1 {v0.16b}, [x1], #16"),
    (0xF9800020, "memory", "prfm pldl1keep, [x1]"),
    (0x91000420, "integer", "add x0, x1, #1"),
    (0x9B020C20, "integer", "madd x0, x1, x2, x3"),
    (0x9A820020, "integer", "csel x0, x1, x2, eq"),
    (0x90000000, "integer", "adrp x0, 0"),
    (0x54000001, "branch", "b.ne"),
    (0xD65F03C0, "branch", "ret"),
    (0xB4000000, "branch", "cbz x0"),
    (0xD63F0020, "branch", "blr x1"),
    (0xD503201F, "other", "nop"),
    (0xD4000001, "other", "svc #0"),
    (0xD53BD040, "other", "mrs x0, tpidr_el0"),
    (0x2518E3E0, "other", "ptrue p0.b"),
]


@pytest.mark.parametrize(("word", "kind", "text"), WORDS, ids=[text for _, _, text in WORDS])
def test_class_of_an_instruction(emulator: Build, word: int, kind: str, text: str) -> None:
    # Lazy, because the functions of the emulator are not there.
    plugin = ctypes.CDLL(str(emulator.plugin), mode=os.RTLD_LAZY)
    assert CLASSES[plugin.classify(ctypes.c_uint32(word))] == kind
