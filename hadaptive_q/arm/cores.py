"""The emulated ARM64 cores: what the emulator is told, and what the guest reads about its processor.

XNNPACK chooses its kernels by the features that the emulator grants (dot products, i8mm) and by the part number in
`/proc/cpuinfo`. Plain `-cpu max` is never used: its SME kernels gave wrong int8 results under QEMU 7.2.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hadaptive_q.errors import UserError, nearest

_ARMV8_0 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
_ARMV8_2 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"


@dataclass(frozen=True)
class Core:
    """One kind of ARM64 core: `cpu` is the emulator's `-cpu` value, `part` the core's number in its MIDR register."""

    name: str
    cpu: str
    part: int
    features: str

    @property
    def cpuinfo(self) -> str:
        """The text of `/proc/cpuinfo` for one such core."""
        lines = {
            "processor": "0",
            "BogoMIPS": "48.00",
            "Features": self.features,
            "CPU implementer": "0x41",
            "CPU architecture": "8",
            "CPU variant": "0x1",
            "CPU part": f"{self.part:#05x}",
            "CPU revision": "0",
        }
        return "".join(f"{key}\t: {value}\n" for key, value in lines.items()) + "\n"

    def lacks(self, features: Iterable[str]) -> list[str]:
        """Return those of `features` that it does not have."""
        return [feature for feature in features if feature not in self.features.split()]


CORES = {
    core.name: core
    for core in (
        Core("cortex-a53", "cortex-a53", 0xD03, _ARMV8_0),
        # The emulator has no A55; an A76 has the same instructions, and the part number picks the A55's kernels.
        Core("cortex-a55", "cortex-a76", 0xD05, _ARMV8_2),
        Core("cortex-a72", "cortex-a72", 0xD08, _ARMV8_0),
        Core("cortex-a76", "cortex-a76", 0xD0B, _ARMV8_2),
        # No V1 either: everything but SME and SVE, for which the stock runtime has SME kernels only.
        Core("neoverse-v1", "max,sme=off,sve=off", 0xD40, f"{_ARMV8_2} sha3 sm3 sm4 asimdfhm dit i8mm bf16 dgh rng"),
    )
}


def find_core(name: str) -> Core:
    """Return the core called `name`; an unknown name raises UserError with the nearest one."""
    if name not in CORES:
        raise UserError(f"core {name}", "no such core", f"one of {', '.join(CORES)}", nearest(name, CORES))
    return CORES[name]
