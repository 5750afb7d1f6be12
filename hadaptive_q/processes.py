"""The processes that train together: which one this is, and which rows of a batch are its own.

`torchrun` and `accelerate launch` say so in the environment; free of torch, so that the command line answers at once.
"""

from __future__ import annotations

import os
from typing import TypeVar

Rows = TypeVar("Rows")


def count() -> int:
    """Return how many processes train together, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def index() -> int:
    """Return the number of this process among them; 0 is the one that writes files and speaks."""
    return int(os.environ.get("RANK", "0")) if "LOCAL_RANK" in os.environ else 0


def own_rows(whole: Rows) -> Rows:
    """Return the part of `whole`, a list or a tensor by its first dimension, that falls to this process."""
    share = len(whole) // count()  # type: ignore[arg-type]
    rows: Rows = whole[index() * share : (index() + 1) * share]  # type: ignore[index]
    return rows
