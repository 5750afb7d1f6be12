"""Count the instructions of one inference on an emulated ARM64 core, and run samples there for parity checks.

Counts repeat exactly: one thread, one inference to warm up, the next one counted over the runtime's `execute()`.
They are instructions, not cycles: a core's width, caches and memory are not modelled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hadaptive_q.arm.guest import INPUTS, MODEL, OUTPUTS, open_guest
from hadaptive_q.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

TIMEOUT = 600.0
INFERENCES = "2"
_TYPES = {"Float": "float32", "Byte": "uint8"}


@dataclass(frozen=True)
class Counts:
    """Executed instructions; `by_class` adds up to `total`.

    Classes: `dot` (SDOT, UDOT, SMMLA and their kin), `simd` (all other vector and floating-point arithmetic and moves),
    `memory` (loads and stores, scalar and vector), `integer`, `branch`, `other`.
    """

    total: int
    by_class: Mapping[str, int]


def count_instructions(pte: Path, core: str, inputs: bytes | None = None, timeout: float = TIMEOUT) -> Counts:
    """Count one inference of `pte` on `core` (a name in `CORES`), a matter of 0.3 to 3 seconds.

    `inputs` are the raw bytes of one sample: every input of the file in turn, contiguous, in the file's own types.
    Without them the inputs are pseudo-random and always the same: x <- 1664525 x + 1013904223 (mod 2^32) from x = 1;
    a float is floor(x / 2^8) / 2^23 - 1, in [-1, 1), a byte floor(x / 2^24); inputs of other types are 0.
    Only steps that depend on data (a sort, a top-k) make the count depend on the inputs.
    Raises UserError for an unknown core, a missing emulator or compiler, a file that the runtime refuses or the core
    cannot run, inputs of another size, and after `timeout` seconds.
    """
    with open_guest(pte, core, timeout) as guest:
        arguments = ["count", MODEL, INFERENCES]
        if inputs is not None:
            (guest.folder / INPUTS).write_bytes(inputs)
            arguments.append(INPUTS)
        _, cuts = guest.count(arguments)
    by_class = cuts[-1].since(cuts[0])
    return Counts(sum(by_class.values()), by_class)


def run_on(pte: Path, core: str, inputs: NDArray[Any] | Tensor, timeout: float = TIMEOUT) -> NDArray[np.float32]:
    """Run samples `(N, ...)` one after the other on `core` and return the outputs `(N, classes)`.

    `inputs` is a numpy array or a CPU tensor: uint8, or floats, which become float32. A sample is the file's one input
    without its first size. Several outputs of a file stand side by side in a row.
    Raises UserError like `count_instructions`, and for samples of another shape or type than the file's.
    """
    array = inputs if isinstance(inputs, np.ndarray) else inputs.detach().numpy()
    samples = np.ascontiguousarray(array, dtype=np.float32 if array.dtype.kind == "f" else None)
    with open_guest(pte, core, timeout) as guest:
        samples.tofile(guest.folder / INPUTS)
        printed = guest.run(["run", MODEL, INPUTS, OUTPUTS])
        outputs = np.fromfile(guest.folder / OUTPUTS, dtype=np.float32)
    # The runner sees bytes only: another shape or type of the same size must be caught here.
    taken = [line.split(" ")[1:] for line in printed if line.startswith("input ")]
    expected = [(_TYPES.get(kind, kind), tuple(int(size) for size in sizes[1:])) for kind, *sizes in taken]
    if expected != [(samples.dtype.name, samples.shape[1:])]:
        wanted = " and ".join(f"{kind} (N, {', '.join(map(str, sizes))})" for kind, sizes in expected)
        raise UserError(f"inputs of {pte}", f"{samples.dtype.name} {samples.shape}", f"samples {wanted}")
    return outputs.reshape(len(samples), -1)
