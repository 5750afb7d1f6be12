"""What one `.pte` costs: latency on this host, instructions on emulated ARM64 cores; ours or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from hadaptive_q.arm.build import find_tools
from hadaptive_q.arm.count import count_instructions
from hadaptive_q.arm.operators import count_operators
from hadaptive_q.errors import UserError
from hadaptive_q.lower.latency import latencies
from hadaptive_q.lower.runtime import TYPES, PteFile, native_log

TAKEN = ("uint8", "float32")


class BenchFile(PteFile):
    """A file that takes one tensor of floats or bytes and answers with any number of tensors.

    Raises UserError for a file with other inputs: nobody knows what to feed it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        found = self._inputs()
        if found not in [[name] for name in TAKEN]:
            count = {0: "no input", 1: "an input"}.get(len(found), f"{len(found)} inputs")
            raise UserError(
                f"file {path}",
                f"{count} ({', '.join(found)})" if found else count,
                "a file with one input, a tensor of float32 or uint8",
            )

    def _inputs(self) -> list[str]:
        meta, found = self._method.metadata, []
        for index in range(meta.num_inputs()):
            try:
                with native_log():
                    kind = int(meta.input_tensor_meta(index).dtype())
            except IndexError:  # how the runtime says that it is a number or a text
                found.append("no tensor")
            else:
                found.append(TYPES.get(kind, f"type {kind}"))
        return found

    def __call__(self, inputs: Tensor) -> Tensor:
        """Run the file and return its first output."""
        result: Tensor = self._method.execute([inputs])[0]
        return result


def bench_files(files: Sequence[Path], cores: Sequence[str], operators: bool = False) -> list[dict[str, Any]]:
    """Return, for every file, `file`, `bytes`, `host_ms_median`, `host_ms_spread` and `arm` by core.

    Latency is that of `lower.latency`. `arm` holds `instructions` and `by_class`, and where wanted `operators`, summed
    by name.
    Raises UserError for a file that the runtime refuses, for one with other inputs than a tensor of floats or bytes,
    for an unknown core or a missing emulator, and where operators are wanted of no core.
    """
    if operators and not cores:
        raise UserError("--operators", "no --core", "a core to count on", "add --core cortex-a76")
    loaded = [BenchFile(file) for file in files]
    if cores:
        find_tools()  # before minutes of work
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


def ratios(result: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Return `bytes`, `host_ms_median` and the instructions by core of `result` as shares of those of `base`."""
    shares: dict[str, Any] = {key: result[key] / base[key] for key in ("bytes", "host_ms_median")}
    arm = {core: cost["instructions"] / base["arm"][core]["instructions"] for core, cost in result["arm"].items()}
    return {**shares, "arm": arm}
