"""INT8 recipes beside the stock recipe: same float models, same calibration samples, same split, several seeds.

    python benchmarks/int8.py --data digits --data glyphs --seeds 3

Every figure comes from running the written file in the ExecuTorch runtime over the whole validation split. A run that
is already in the output folder is not repeated. Writes benchmarks/results/int8.json and the table in README.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from stock import stock_float, stock_int8

from hadaptive_q.atomic import output_folder, write_bytes, write_text
from hadaptive_q.data.calibration import batches, find_manifest, resolve
from hadaptive_q.data.sources import open_data
from hadaptive_q.lower.parity import agreement, compare, sqnr_db, top1
from hadaptive_q.lower.runtime import PteFile
from hadaptive_q.models.checkpoint import load_model
from hadaptive_q.pipeline import quantize
from hadaptive_q.recipe import load_recipe
from hadaptive_q.report.record import Report
from hadaptive_q.train.loop import predict

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "int8.json"
README = ROOT / "README.md"
START, END = "<!-- results:int8 -->", "<!-- /results:int8 -->"
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
        output_folder(RESULTS.parent)
        write_text(RESULTS, json.dumps(rows, indent=1) + "\n")
    rows = json.loads(RESULTS.read_text())
    before, rest = README.read_text().split(START)
    write_text(README, f"{before}{START}\n{_table(rows)}\n{END}{rest.split(END)[1]}")


def _rows(data: str, seed: int, out: Path) -> list[dict[str, Any]]:
    """Train one float model and quantize it in every way."""
    rows, checkpoint = [], None
    for name in RECIPES:
        if name in FIRST_SEED_ONLY and seed > 0:
            continue
        folder = out / f"{data}-{seed}-{name}"
        recipe = load_recipe(name, _settings(name, data, seed))
        report = folder / "report.json"
        if not report.is_file() or Report.model_validate_json(report.read_text()).recipe_digest != recipe.digest():
            quantize(recipe, folder, checkpoint)
        checkpoint = checkpoint or folder / "float.safetensors"
        rows.append(_from_report(Report.model_validate_json(report.read_text())))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    assert checkpoint is not None
    rows.append(_stock(data, seed, checkpoint, out))
    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def _settings(name: str, data: str, seed: int) -> list[str]:
    """Return the ``--set`` of one run."""
    settings = [f"data={data}", f"seed={seed}"]
    if data in FLOAT_EPOCHS:
        settings.append(f"float.epochs={FLOAT_EPOCHS[data]}")
    if data in FIT_EPOCHS and load_recipe(name).fit:
        settings.append(f"fit.epochs={FIT_EPOCHS[data]}")
    return settings


def _from_report(report: Report) -> dict[str, Any]:
    return {
        "data": report.data,
        "seed": report.seed,
        "recipe": report.recipe,
        "float_top1": report.accuracy.float_top1,
        "program_top1": report.accuracy.quantized_top1,
        "file_top1": report.accuracy.pte_top1,
        "file_program_agreement": report.parity.top1_agreement,
        "file_program_sqnr_db": report.parity.sqnr_db,
        "file_float_agreement": report.parity.float_agreement,
        "file_float_sqnr_db": report.parity.float_sqnr_db,
        "bytes": report.size.pte_bytes,
        "float_bytes": report.size.float_pte_bytes,
        "samples": report.accuracy.samples,
    }


def _stock(data_name: str, seed: int, checkpoint: Path, out: Path) -> dict[str, Any]:
    """Measure the stock recipe on the same float model; calibrated on the very same samples."""
    kept = out / f"{data_name}-{seed}-stock.json"
    if kept.is_file():
        row: dict[str, Any] = json.loads(kept.read_text())
        return row
    model = load_model(checkpoint)
    preprocess = model.preprocess
    assert preprocess is not None
    data = open_data(data_name, preprocess.image_size)
    manifest = resolve(find_manifest("auto", data), data)
    program, file = stock_int8(model, batches(manifest, data, 64), preprocess.image_size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stock.pte"
        write_bytes(path, file)
        shipped = PteFile(path).predict(data.val, preprocess)
    reference, labels = predict(model, data.val, preprocess)
    converted, _ = predict(program, data.val, preprocess)
    parity = compare(converted, shipped, 1.0)
    row = {
        "data": data.name,
        "seed": seed,
        "recipe": "stock",
        "float_top1": top1(reference, labels),
        "program_top1": top1(converted, labels),
        "file_top1": top1(shipped, labels),
        "file_program_agreement": parity.top1_agreement,
        "file_program_sqnr_db": parity.sqnr_db,
        "file_float_agreement": agreement(reference, shipped),
        "file_float_sqnr_db": sqnr_db(reference, shipped),
        "bytes": len(file),
        "float_bytes": len(stock_float(model, preprocess.image_size)),
        "samples": len(labels),
    }
    write_text(kept, json.dumps(row))
    return row


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", f"| {' | '.join('---' for _ in COLUMNS)} |"]
    for data in dict.fromkeys(row["data"] for row in rows):
        for recipe in NAMES:
            chosen = [row for row in rows if row["data"] == data and row["recipe"] == recipe]
            if chosen:
                lines.append(_line(data, recipe, chosen))
    return "\n".join(lines)


def _line(data: str, recipe: str, rows: list[dict[str, Any]]) -> str:
    def mean(key: str) -> float:
        return statistics.fmean(float(row[key]) for row in rows)

    drops = [row["float_top1"] - row["file_top1"] for row in rows]
    agreements = [100 * row["file_program_agreement"] for row in rows]
    each = ", ".join(f"{drop:+.2f}" for drop in drops)
    cells = (
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
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
