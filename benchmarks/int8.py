"""INT8 recipes beside the stock recipe: same float models, same calibration samples, same split, several seeds.

    python benchmarks/int8.py --data digits --data glyphs --seeds 3

Every figure comes from running the written file in the ExecuTorch runtime over the whole validation split. A run that
is already in the output folder is not repeated. Writes benchmarks/results/int8.json and the table in README.md.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from rows import ROOT, Row, markdown, run, stock_row, write_results, write_section

from hadaptive_q.recipe import load_recipe

COLUMNS = (
    "data",
    "recipe",
    "float top-1",
    "`.pte` top-1",
    "drop (per seed)",
    "file = program",
    "file = float",
    "logit SQNR, file to program / to float",
    "bytes / float",
)
RECIPES = ("int8", "int8_static", "int8_ptq")
# The recipes' epochs are for a thousand images; ten thousand need fewer.
FLOAT_EPOCHS, FIT_EPOCHS = {"glyphs": 10}, {"glyphs": 2}
FIRST_SEED_ONLY = ("int8_static", "int8_ptq")
NAMES = {
    "int8": "`int8` (QAT)",
    "int8_static": "`int8_static` (QAT)",
    "int8_ptq": "`int8_ptq`",
    "stock": "stock `XNNPACKQuantizer` PTQ",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", action="append", default=[])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "int8")
    parser.add_argument("--render", action="store_true", help="only write the README table from the results")
    arguments = parser.parse_args()
    if not arguments.render:
        rows = [
            row
            for data in arguments.data or ["digits"]
            for seed in range(arguments.seeds)
            for row in _rows(data, seed, arguments.out)
        ]
        write_results("int8", rows)
    write_section("int8", _table)


def _rows(data: str, seed: int, out: Path) -> list[Row]:
    """Train one float model and quantize it in every way."""
    rows, checkpoint = [], None
    for name in RECIPES:
        if name in FIRST_SEED_ONLY and seed > 0:
            continue
        folder = out / f"{data}-{seed}-{name}"
        rows.append(run(load_recipe(name, _settings(name, data, seed)), folder, checkpoint))
        checkpoint = checkpoint or folder / "float.safetensors"
    assert checkpoint is not None
    rows.append(stock_row(data, seed, checkpoint, out / f"{data}-{seed}-stock.json"))
    return rows


def _settings(name: str, data: str, seed: int) -> list[str]:
    """Return the ``--set`` of one run."""
    settings = [f"data={data}", f"seed={seed}"]
    if data in FLOAT_EPOCHS:
        settings.append(f"float.epochs={FLOAT_EPOCHS[data]}")
    if data in FIT_EPOCHS and load_recipe(name).fit:
        settings.append(f"fit.epochs={FIT_EPOCHS[data]}")
    return settings


def _table(rows: list[Row]) -> str:
    lines = []
    for data in dict.fromkeys(row["data"] for row in rows):
        for recipe in NAMES:
            chosen = [row for row in rows if row["data"] == data and row["recipe"] == recipe]
            if chosen:
                lines.append(_line(data, recipe, chosen))
    return markdown(COLUMNS, lines)


def _line(data: str, recipe: str, rows: list[Row]) -> tuple[str, ...]:
    def mean(key: str) -> float:
        return statistics.fmean(float(row[key]) for row in rows)

    drops = [row["float_top1"] - row["file_top1"] for row in rows]
    agreements = [100 * row["file_program_agreement"] for row in rows]
    each = ", ".join(f"{drop:+.2f}" for drop in drops)
    return (
        f"{data} ({rows[0]['samples']} images)",
        NAMES[recipe],
        f"{mean('float_top1'):.2f}",
        f"{mean('file_top1'):.2f}",
        f"{statistics.fmean(drops):+.2f} ({each})",
        f"{statistics.fmean(agreements):.2f} % (least {min(agreements):.2f})",
        f"{100 * mean('file_float_agreement'):.2f} %",
        f"{mean('file_program_sqnr_db'):.1f} / {mean('file_float_sqnr_db'):.1f} dB",
        f"{mean('bytes') / mean('float_bytes'):.3f}",
    )


if __name__ == "__main__":
    main()
