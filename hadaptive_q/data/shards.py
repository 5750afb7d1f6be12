"""Shards of a data set in a folder: which split each belongs to, by its name, and whether all are there."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from hadaptive_q.data.datasets import VAL_NAMES
from hadaptive_q.errors import UserError

_NUMBERED = re.compile(r"(.*)-(\d+)-of-(\d+)")
_SHOWN = 3


def shards_by_split(shards: Iterable[Path], where: str) -> dict[str, list[str]]:
    """Return the shards of ``train`` and of validation splits; a name that begins like no split is training data.

    Raises UserError where names count shards, as `train-00000-of-00004` does, and some are missing.
    """
    found: dict[str, list[str]] = {}
    numbered: dict[tuple[str, int], set[int]] = {}
    for shard in sorted(shards):
        split = next((n for n in (*VAL_NAMES, "train") if shard.name.startswith(n)), "train")
        found.setdefault(split, []).append(str(shard))
        if match := _NUMBERED.fullmatch(shard.stem):
            numbered.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (name, count), present in numbered.items():
        missing = [number for number in range(count) if number not in present]
        if missing:
            shown = ", ".join(map(str, missing[:_SHOWN])) + (", ..." if len(missing) > _SHOWN else "")
            raise UserError(where, f"no shard {shown} of {name}", f"all {count}, counted from 0", "copy the others")
    return found
