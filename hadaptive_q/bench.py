"""What one `.pte` costs: latency on this host, instructions on emulated ARM64 cores; ours or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hadaptive_q.arm.count import count_instructions
from hadaptive_q.arm.operators import count_operators
from hadaptive_q.lower.latency import latencies
from hadaptive_q.lower.runtime import PteFile


def bench_files(files: Sequence[Path], cores: Sequence[str], operators: bool = False) -> list[dict[str, Any]]:
    """Return, for every file, `file`, `bytes`, `host_ms_median`, `host_ms_spread` and `arm` by core.

    Latency is that of `lower.latency`. `arm` holds `instructions` and `by_class`, and where wanted `operators`, summed
    by name.
    Raises UserError for a file that the runtime refuses, an unknown core or a missing emulator.
    """
    loaded = [PteFile(file) for file in files]
    measured = latencies(loaded, [file.example() for file in loaded])
    results = []
    for file, (median, spread) in zip(files, measured, strict=True):
        arm = {core: _count(file, core, operators) for core in cores}
        size = file.stat().st_size
        results.append(
            {"file": str(file), "bytes": size, "host_ms_median": median, "host_ms_spread": spread, "arm": arm}
        )
    return results


def _count(file: Path, core: str, operators: bool) -> dict[str, Any]:
    counts = count_instructions(file, core)
    result: dict[str, Any] = {"instructions": counts.total, "by_class": dict(counts.by_class)}
    if operators:
        by_name: dict[str, int] = {}
        for operator in count_operators(file, core):
            by_name[operator.name] = by_name.get(operator.name, 0) + operator.counts.total
        result["operators"] = dict(sorted(by_name.items(), key=lambda item: -item[1]))
    return result
