"""Networks of four families beside each other: what their INT8 files answer and cost, trained and quantized alike.

    python benchmarks/families.py --out runs/families

The command is that of the page: finished runs in the folder are not repeated. What stock tools make of the same float
networks is in the table of `benchmarks/int8.py`. The comparison is kept as benchmarks/results/families.json, from which
the table in docs/compare.md is made.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from int8 import settings
from rows import ROOT, markdown, write_table

from hadaptive_q.atomic import write_text
from hadaptive_q.report.comparison import Comparison

MODELS = ("hadaptive_net_s", "mobilenet_v3_small", "rcvit_xs", "s2aformer_mini")
DATA, RECIPE = "glyphs", "int8"
RESULT, PAGE = ROOT / "benchmarks" / "results" / "families.json", ROOT / "docs" / "compare.md"
COLUMNS = (
    "model",
    "parameters, MACs",
    "float top-1",
    "file top-1",
    "drop, 95 %",
    "SQNR",
    "bytes, of float",
    "M instructions, of float",
    "time here, ratio",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "families")
    parser.add_argument("--render", action="store_true", help="only write the table from the results")
    arguments = parser.parse_args()
    if not arguments.render:
        # Each model is a setting of its own.
        own = [f"--set={setting}" for setting in settings(RECIPE, "", DATA, 0) if not setting.startswith("model=")]
        command = ["compare", *MODELS, "--recipe", RECIPE, "--data", DATA, *own, "--out", str(arguments.out)]
        subprocess.run([sys.executable, "-m", "hadaptive_q", *command], check=True)
        write_text(RESULT, (arguments.out / "compare.json").read_text())
    write_table("families", _table(Comparison.model_validate_json(RESULT.read_text())), PAGE)


def _table(record: Comparison) -> str:
    lines: list[tuple[str, ...]] = []
    for m in record.models:
        assert m.instructions is not None
        lines.append(
            (
                f"`{m.name}`",
                f"{m.params / 1e6:.2f} M, {m.macs / 1e6:.1f} M",
                f"{m.accuracy.float_top1:.2f}",
                f"{m.accuracy.pte_top1:.2f}",
                f"{m.drop.points:+.2f} ({m.drop.low:+.2f} to {m.drop.high:+.2f})",
                f"{m.float_sqnr_db:.1f} dB",
                f"{m.pte_bytes:,}, {m.pte_bytes / m.float_pte_bytes:.3f}",
                f"{m.instructions.pte / 1e6:.2f}, {m.instructions.pte / m.instructions.float_pte:.3f}",
                f"{m.latency_ratio:.2f}",
            )
        )
    return markdown(COLUMNS, lines)


if __name__ == "__main__":
    main()
