"""What each part of a recipe is worth: one field changed at a time, on the same float model and data.

    python benchmarks/ablation.py --data glyphs
    python benchmarks/ablation.py --data glyphs --recipe int4

Every figure comes from running the written file in the ExecuTorch runtime over the whole validation split; the stock
INT8 recipe stands beside. A row that is already in the output folder is not repeated. Writes
benchmarks/results/ablation.json and the table in README.md; for `int4` ablation_int4.json and docs/int4.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from rows import README, ROOT, Row, flips, markdown, run, stock_row, write_results, write_section

from hadaptive_q.recipe import load_recipe

# What is changed in a recipe; a second row for the same field is a second value of it.
INT8: dict[str, tuple[str, ...]] = {
    "`int8`": (),
    "no training: `int8_ptq`": ("int8_ptq",),
    "`int8_ptq`, `observer: minmax`": ("int8_ptq", "quantize.observer=minmax"),
    "`int8_ptq`, `observer: mse`": ("int8_ptq", "quantize.observer=mse"),
    "`int8_ptq`, `observer: product`": ("int8_ptq", "quantize.observer=product"),
    "labels only, no teacher": ("fit.distill=0.0", "fit.distill_features=0.0"),
    "the teacher's logits only": ("fit.distill_features=0.0",),
    "margin of the teacher's selections": ("fit.margin.weight=0.01",),
    "five times the learning rate": ("fit.lr=1e-4",),
    "BatchNorm live": ("fit.batch_norm=live",),
    "oscillation damping": ("fit.damping=0.01",),
    "EMA of weights": ("fit.ema=0.98",),
    "ranges follow the batches": ("quantize.ranges=observed",),
    "ranges frozen from the start": ("fit.freeze_ranges=0.0",),
    "ranges never frozen": ("fit.freeze_ranges=1.0",),
    "`selection: static`": ("int8_static",),
}
INT4: dict[str, tuple[str, ...]] = {
    "`int4`": (),
    "no training: `int4_ptq`": ("int4_ptq",),
    "`int4_ptq`, `rounding: nearest`": ("int4_ptq", "quantize.rounding=nearest"),
    "`rounding: nearest`": ("quantize.rounding=nearest",),
    "labels only, no teacher": ("fit.distill=0.0", "fit.distill_features=0.0"),
    "the teacher's logits only": ("fit.distill_features=0.0",),
    "a fifth of the learning rate": ("fit.lr=2e-5",),
    "five times the learning rate": ("fit.lr=5e-4",),
    "scales of weights learned": ("quantize.weight_ranges=learned",),
    "oscillation damping": ("fit.damping=0.001",),
    "`rounding: nearest`, 8 bits in the first half": ("quantize.rounding=nearest", "fit.gradual=0.5"),
}
EPOCHS = {"glyphs": (10, 2)}
COLUMNS = (
    "drop",
    "file = float",
    "logit SQNR, file to float",
    "file = program",
    "logit SQNR, file to program",
    "set / rank flips",
)
TABLES = {"int8": (INT8, "ablation", README), "int4": (INT4, "ablation_int4", ROOT / "docs" / "int4.md")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", choices=TABLES, default="int8")
    parser.add_argument("--data", default="glyphs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="the float model; trained by the recipe unless given")
    parser.add_argument("--out", type=Path, help="runs/ablation or runs/ablation_int4 unless given")
    parser.add_argument("--finished", action="store_true", help="leave out rows that the output folder does not hold")
    parser.add_argument("--render", action="store_true", help="only write the table from the results")
    arguments = parser.parse_args()
    base: str = arguments.recipe
    changes, section, page = TABLES[base]
    if not arguments.render:
        out: Path = arguments.out or ROOT / "runs" / section
        rows = _rows(base, changes, arguments.data, arguments.seed, out, arguments.checkpoint, arguments.finished)
        write_results(section, rows)
    write_section(section, lambda rows: _table(base, rows), page)


def _rows(
    base: str,
    changes: Mapping[str, tuple[str, ...]],
    data: str,
    seed: int,
    out: Path,
    checkpoint: Path | None,
    finished: bool,
) -> list[Row]:
    rows: list[Row] = []
    for index, (title, change) in enumerate(changes.items()):
        name, *settings = change if change and "=" not in change[0] else (base, *change)
        folder = out / f"{data}-{seed}-{index:02}"
        if finished and not (folder / "report.json").is_file():
            continue
        recipe = load_recipe(name, [f"data={data}", f"seed={seed}", *_epochs(name, data), *settings])
        rows.append({"change": title, "settings": list(change), **run(recipe, folder, checkpoint)})
        checkpoint = checkpoint or folder / "float.safetensors"
    assert checkpoint is not None
    stock = stock_row(data, seed, checkpoint, out / f"{data}-{seed}-stock.json")
    return [*rows, {"change": "stock `XNNPACKQuantizer` PTQ", "settings": [], **stock}]


def _epochs(name: str, data: str) -> list[str]:
    if data not in EPOCHS:
        return []
    trained, fitted = EPOCHS[data]
    return [f"float.epochs={trained}"] + ([f"fit.epochs={fitted}"] if load_recipe(name).fit else [])


def _table(base: str, rows: list[Row]) -> str:
    return markdown((f"changed in `{base}`", *COLUMNS), [_line(row) for row in rows])


def _line(row: Row) -> tuple[str, ...]:
    return (
        row["change"],
        f"{row['float_top1'] - row['file_top1']:+.2f}",
        f"{100 * row['file_float_agreement']:.2f} %",
        f"{row['file_float_sqnr_db']:.1f} dB",
        f"{100 * row['file_program_agreement']:.2f} %",
        f"{row['file_program_sqnr_db']:.1f} dB",
        flips(row["set_flip_rate"], row["rank_flip_rate"]) if "set_flip_rate" in row else "",
    )


if __name__ == "__main__":
    main()
