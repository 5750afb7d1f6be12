"""What every rewrite of the deploy form saves: S in int8 without each of them in turn, on one emulated core.

    python benchmarks/rewrites.py

Some graphs without a rewrite do not lower, others leave operators outside of the delegate; the table says which. Kept
in benchmarks/results/rewrites.json, from which the table in docs/lowering.md is made.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
from files import lower_int8, random_model
from rows import ROOT, Row, markdown, write_results, write_section
from torch import Tensor

from hadaptive_q.arm.count import count_instructions
from hadaptive_q.errors import UserError
from hadaptive_q.lower import executorch
from hadaptive_q.lower.runtime import PteFile
from hadaptive_q.models.network import Network
from hadaptive_q.rewrite.deploy import REWRITES
from hadaptive_q.rewrite.graph import trace

MODEL, IMAGE_SIZE, CORE = "hadaptive_net_s", 224, "cortex-a76"
COLUMNS = ("left out", "instructions", "saves", "delegates", "operators outside", "bytes")
PAGE = ROOT / "docs" / "lowering.md"
# What lowering itself adds, by what takes it out again.
LOWERING = {
    "tidy_delegate": ("tidy_delegate", lambda delegate: None),
    "int8_tables": ("_CONFIGS", list(ALL_PARTITIONER_CONFIGS)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="only write the table from the results")
    if not parser.parse_args().render:
        model, inputs = random_model(MODEL, IMAGE_SIZE)
        names = ["", *(rewrite.__name__ for rewrite in REWRITES), *LOWERING]
        write_results("rewrites", [_without(name, model, inputs) for name in names])
    write_section("rewrites", _table, PAGE)


def _without(left_out: str, model: Network, inputs: Tensor) -> Row:
    graph = trace(model, IMAGE_SIZE)
    row: Row = {"left_out": left_out, "core": CORE}
    try:
        for rewrite in REWRITES:
            if rewrite.__name__ != left_out:
                rewrite(graph)
        with patch.object(executorch, *LOWERING[left_out]) if left_out in LOWERING else nullcontext():
            lowered = lower_int8(graph, inputs)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "file.pte"
            path.write_bytes(lowered.data)
            file = PteFile(path)
            file(file.example())
            row["instructions"] = count_instructions(path, CORE).total
    except (AssertionError, KeyError, RuntimeError, UserError, ValueError) as error:
        if not left_out:
            raise
        row["refused"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    else:
        outside = list(lowered.coverage.portable_ops)
        row |= {"bytes": len(lowered.data), "delegates": lowered.coverage.delegates, "portable_ops": outside}
    print(row, flush=True)
    return row


def _table(rows: list[Row]) -> str:
    whole = next(row for row in rows if not row["left_out"])
    return markdown(COLUMNS, [_line(row, whole) for row in rows])


def _line(row: Row, whole: Row) -> tuple[str, ...]:
    name = f"`{row['left_out']}`" if row["left_out"] else "nothing"
    if "refused" in row:
        return (name, "does not lower", "", "", "", "")
    saved = f"{row['instructions'] - whole['instructions']:+,}" if row["left_out"] else ""
    kinds = sorted(set(row["portable_ops"]))
    outside = ", ".join(f"{row['portable_ops'].count(kind)} `{kind}`" for kind in kinds) or "none"
    return (name, f"{row['instructions']:,}", saved, str(row["delegates"]), outside, f"{row['bytes']:,}")


if __name__ == "__main__":
    main()
