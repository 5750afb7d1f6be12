"""Host latency of files, measured side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

from torch import Tensor

RUNS, WARMUP = 60, 10


def latencies(files: Sequence[Callable[[Tensor], Tensor]], inputs: Sequence[Tensor]) -> list[tuple[float, float]]:
    """Return (median, half the interquartile range) in milliseconds of every file on its own input.

    All files run in alternation, so that a drift of the machine's speed meets all of them.
    """
    times: list[list[float]] = [[] for _ in files]
    for run in range(RUNS + WARMUP):
        for file, example, kept in zip(files, inputs, times, strict=True):
            start = time.perf_counter()
            file(example)
            if run >= WARMUP:
                kept.append((time.perf_counter() - start) * 1e3)
    quarters = [statistics.quantiles(kept, n=4) for kept in times]
    return [(middle, (high - low) / 2) for low, middle, high in quarters]
