"""What every layer's 4-bit weights cost in instructions on an emulated core: two files, operator by operator."""

from __future__ import annotations

from pathlib import Path

from hadaptive_q.arm.operators import Operator, count_operators

_LAYERS = ("Convolution", "Fully Connected")
_FOUR_BITS = "QC4W"


def instructions_added(eight: Path, four: Path, core: str) -> list[int]:
    """Return what every layer of 4-bit weights in the file `four` takes beyond the same layer in `eight`, in order.

    Both files hold the same network but for the bits of its weights. Raises RuntimeError where their layers differ.
    """
    before, after = (_layers(path, core) for path in (eight, four))
    if len(before) != len(after):
        raise RuntimeError(f"{eight} has {len(before)} layers, {four} has {len(after)}")
    return [
        new.counts.total - old.counts.total
        for old, new in zip(before, after, strict=True)
        if _FOUR_BITS in new.name and _FOUR_BITS not in old.name
    ]


def _layers(path: Path, core: str) -> list[Operator]:
    return [operator for operator in count_operators(path, core) if any(kind in operator.name for kind in _LAYERS)]
