"""What one `.pte` costs: latency on this host, instructions on emulated ARM64 cores; ours or not."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hadaptive_q.arm.count import count_instructions
from hadaptive_q.arm.operators import count_operators
from hadaptive_q.lower.runtime import PteFile

RUNS, WARMUP = 60, 10


def bench_files(files: Sequence[Path], cores: Sequence[str], operators: bool = False) -> list[dict[str, Any]]:
    """Return, for every file, `file`, `bytes`, `host_ms_median`, `host_ms_spread` and `arm` by core.

    Latency: all files in alternation, so that a drift of the machine's speed meets all of them; the spread is half the
    interquartile range. `arm` holds `instructions` and `by_class`, and `operators` (summed by name) where wanted.
    Raises UserError for a file that the runtime refuses, an unknown core or a missing emulator.
    """
    loaded = [PteFile(file) for file in files]
    results = []
    for file, (median, spread) in zip(files, _latencies(loaded), strict=True):
        arm = {core: _count(file, core, operators) for core in cores}
        size = file.stat().st_size
        results.append(
            {"file": str(file), "bytes": size, "host_ms_median": median, "host_ms_spread": spread, "arm": arm}
        )
    return results


def _latencies(files: Sequence[PteFile]) -> list[tuple[float, float]]:
    inputs = [file.example() for file in files]
    times: list[list[float]] = [[] for _ in files]
    for run in range(RUNS + WARMUP):
        for file, example, kept in zip(files, inputs, times, strict=True):
            start = time.perf_counter()
            file(example)
            if run >= WARMUP:
                kept.append((time.perf_counter() - start) * 1e3)
    quarters = [statistics.quantiles(kept, n=4) for kept in times]
    return [(middle, (high - low) / 2) for low, middle, high in quarters]


def _count(file: Path, core: str, operators: bool) -> dict[str, Any]:
    counts = count_instructions(file, core)
    result: dict[str, Any] = {"instructions": counts.total, "by_class": dict(counts.by_class)}
    if operators:
        by_name: dict[str, int] = {}
        for operator in count_operators(file, core):
            by_name[operator.name] = by_name.get(operator.name, 0) + operator.counts.total
        result["operators"] = dict(sorted(by_name.items(), key=lambda item: -item[1]))
    return result
