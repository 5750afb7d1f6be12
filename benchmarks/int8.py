"""INT8 recipes beside the stock recipe: same float models, same calibration samples, same split, several seeds.

    python benchmarks/int8.py --data digits --data glyphs --seeds 3
    python benchmarks/int8.py --model hadaptive_net_m --data glyphs --seeds 1 --recipe int8

Every figure comes from running the written file in the ExecuTorch runtime over the whole validation split. A run that
is already in the output folder is not repeated. Rows replace those of the same model, data, seed and recipe in
benchmarks/results/int8.json, from which the tables in README.md and docs/products.md are made.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from rows import (
    README,
    ROOT,
    Row,
    flips,
    markdown,
    read_results,
    run,
    stock_int4_row,
    stock_row,
    write_results,
    write_table,
)

from hadaptive_q.recipe import load_recipe

COLUMNS = (
    "model, data",
    "recipe",
    "float top-1",
    "`.pte` top-1",
    "drop (per seed)",
    "file = program",
    "file = float",
    "logit SQNR, file to program / to float",
    "set / rank flips",
    "bytes / float",
)
RECIPES = ("int8", "int8_static", "int8_ptq", "int4", "int4_ptq")
PRODUCTS = ROOT / "docs" / "products.md"
# The recipes' epochs are for a thousand images; ten thousand need fewer.
FLOAT_EPOCHS, FIT_EPOCHS = {"glyphs": 10}, {"glyphs": 2}
FIRST_SEED_ONLY: tuple[str, ...] = ()
NAMES = {
    "int8": "`int8` (QAT)",
    "int8_static": "`int8_static` (QAT)",
    "int8_ptq": "`int8_ptq`",
    "int8_brevitas": "`int8_brevitas` (QAT)",
    "int4_brevitas": "`int4_brevitas` (QAT, W4A8)",
    "w4a4_brevitas": "`w4a4_brevitas` (QAT, W4A4)",
    "stock": "stock `XNNPACKQuantizer` PTQ",
    "int4": "`int4` (QAT)",
    "int4_ptq": "`int4_ptq`",
    "stock_int4": "stock PTQ, weights of 4 bits",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", action="append", default=[])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", default="hadaptive_net_s")
    parser.add_argument("--recipe", action="append", default=[], help="all unless given")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "int8")
    parser.add_argument("--render", action="store_true", help="only write the README table from the results")
    arguments = parser.parse_args()
    if not arguments.render:
        for data in arguments.data or ["digits"]:
            for seed in range(arguments.seeds):
                _keep(_rows(arguments.model, data, seed, arguments.recipe or RECIPES, arguments.out))
    _write_tables(read_results("int8"))


def _write_tables(rows: list[Row]) -> None:
    """Write Hadaptive-Net's rows into the README, those of other families where their products are told of."""
    own = [row for row in rows if str(row["model"]).startswith("hadaptive_net")]
    write_table("int8", _table(own), README)
    write_table("int8_others", _table([row for row in rows if row not in own]), PRODUCTS)


def _keep(rows: list[Row]) -> None:
    """Let `rows` replace the earlier ones of the same runs."""
    kept = {_identity(row): row for row in [*read_results("int8"), *rows]}
    write_results("int8", sorted(kept.values(), key=_identity))


def _identity(row: Row) -> tuple[str, str, int, int]:
    return str(row["data"]), str(row["model"]), list(NAMES).index(row["recipe"]), int(row["seed"])


def _rows(model: str, data: str, seed: int, recipes: Sequence[str], out: Path) -> list[Row]:
    """Train one float model and quantize it in every way."""
    rows, checkpoint = [], None
    prefix = f"{model.removeprefix('hadaptive_net_')}-{data}-{seed}"
    for name in recipes:
        if name in FIRST_SEED_ONLY and seed > 0:
            continue
        folder = out / f"{prefix}-{name}"
        rows.append(run(load_recipe(name, settings(name, model, data, seed)), folder, checkpoint))
        checkpoint = checkpoint or folder / "float.safetensors"
    assert checkpoint is not None
    rows.append(stock_row(data, seed, checkpoint, out / f"{prefix}-stock.json"))
    if any(name.startswith("int4") for name in recipes):
        rows.append(stock_int4_row(data, seed, checkpoint, out / f"{prefix}-stock-int4.json"))
    return rows


def settings(name: str, model: str, data: str, seed: int) -> list[str]:
    """Return the ``--set`` of one run."""
    given = [f"model={model}", f"data={data}", f"seed={seed}"]
    if data in FLOAT_EPOCHS:
        given.append(f"float.epochs={FLOAT_EPOCHS[data]}")
    if data in FIT_EPOCHS and load_recipe(name).fit:
        given.append(f"fit.epochs={FIT_EPOCHS[data]}")
    return given


def _table(rows: list[Row]) -> str:
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(_identity(row)[:3], []).append(row)
    return markdown(COLUMNS, [_line(group) for group in groups.values()])


def _line(rows: list[Row]) -> tuple[str, ...]:
    first = rows[0]

    def mean(key: str) -> float:
        return statistics.fmean(float(row[key]) for row in rows)

    if first["file_top1"] is None:
        return _without_file(rows)
    drops = [row["float_top1"] - row["file_top1"] for row in rows]
    agreements = [100 * row["file_program_agreement"] for row in rows]
    each = ", ".join(f"{drop:+.2f}" for drop in drops)
    return (
        f"{first['model'].removeprefix('hadaptive_net_').upper()}, {first['data']} ({first['samples']} images)",
        NAMES[first["recipe"]],
        f"{mean('float_top1'):.2f}",
        f"{mean('file_top1'):.2f}",
        f"{statistics.fmean(drops):+.2f} ({each})",
        f"{statistics.fmean(agreements):.2f} % (least {min(agreements):.2f})",
        f"{100 * mean('file_float_agreement'):.2f} %",
        f"{mean('file_program_sqnr_db'):.1f} / {mean('file_float_sqnr_db'):.1f} dB",
        flips(mean("set_flip_rate"), mean("rank_flip_rate")) if "set_flip_rate" in first else "",
        f"{mean('bytes') / mean('float_bytes'):.3f}",
    )


def _without_file(rows: list[Row]) -> tuple[str, ...]:
    """Return the line of a recipe whose program is all there is."""
    first, drops = rows[0], [row["float_top1"] - row["program_top1"] for row in rows]
    agreement, sqnr = (
        statistics.fmean(row[key] for row in rows) for key in ("program_float_agreement", "program_float_sqnr_db")
    )
    return (
        f"{first['model'].removeprefix('hadaptive_net_').upper()}, {first['data']} ({first['samples']} images)",
        f"{NAMES[first['recipe']]}: no file loads, its program",
        f"{statistics.fmean(row['float_top1'] for row in rows):.2f}",
        f"{statistics.fmean(row['program_top1'] for row in rows):.2f}",
        f"{statistics.fmean(drops):+.2f} ({', '.join(f'{drop:+.2f}' for drop in drops)})",
        "",
        f"{100 * agreement:.2f} %",
        f"{sqnr:.1f} dB",
        "",
        "",
    )


if __name__ == "__main__":
    main()
