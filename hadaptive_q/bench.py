"""What one `.pte` costs: latency on this host, instructions on emulated ARM64 cores; ours or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hadaptive_q.arm.build import find_tools
from hadaptive_q.arm.cores import find_core
from hadaptive_q.arm.count import count_instructions
from hadaptive_q.arm.operators import count_operators
from hadaptive_q.errors import UserError
from hadaptive_q.lower.cpu_features import wanted_arm_features
from hadaptive_q.lower.isolated import isolated
from hadaptive_q.lower.latency import latencies
from hadaptive_q.lower.runtime import PteFile


def bench_files(files: Sequence[Path], cores: Sequence[str], operators: bool = False) -> list[dict[str, Any]]:
    """Return the cost of every file: `file`, `bytes`, `wanted_arm_features`, `host_ms_median`, `host_ms_spread`, `arm`.

    Files run in a process of their own. Latency is that of `lower.latency`. `arm` holds by core `instructions`,
    `by_class`, `missing_features` (wanted ones that the core lacks: it took slower kernels), and with `operators`
    these, summed by name.
    Raises UserError for a file that the runtime refuses, for one with other inputs than a tensor of floats or bytes,
    for an unknown core or a missing emulator, and where operators are wanted of no core.
    """
    if operators and not cores:
        raise UserError("--operators", "no --core", "a core to count on", "add --core cortex-a76")
    if cores:
        find_tools()  # before minutes of work
    names = [str(file) for file in files]
    return isolated(bench_written, f"file {', '.join(names)}", names, list(cores), operators)


def bench_written(names: Sequence[str], cores: Sequence[str], operators: bool) -> list[dict[str, Any]]:
    """Do the work of `bench_files` for the files called `names` in this very process."""
    files = [Path(name) for name in names]
    loaded = [PteFile(file) for file in files]
    measured = latencies(loaded, [file.example() for file in loaded])
    results = []
    for file, (median, spread) in zip(files, measured, strict=True):
        content = file.read_bytes()
        wanted = wanted_arm_features(content)
        arm = {
            core: {**_count(file, core, operators), "missing_features": find_core(core).lacks(wanted)} for core in cores
        }
        results.append(
            {
                "file": str(file),
                "bytes": len(content),
                "wanted_arm_features": list(wanted),
                "host_ms_median": median,
                "host_ms_spread": spread,
                "arm": arm,
            }
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


def ratios(result: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Return `bytes`, `host_ms_median` and the instructions by core of `result` as shares of those of `base`."""
    shares: dict[str, Any] = {key: result[key] / base[key] for key in ("bytes", "host_ms_median")}
    arm = {core: cost["instructions"] / base["arm"][core]["instructions"] for core, cost in result["arm"].items()}
    return {**shares, "arm": arm}
