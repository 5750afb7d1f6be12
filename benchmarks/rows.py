"""Rows of the accuracy tables: a run of ours, the stock recipe on the same float model, and where they are kept."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from stock import stock_float, stock_int4, stock_int8
from torch import Tensor

from hadaptive_q.atomic import output_folder, write_bytes, write_text
from hadaptive_q.data.calibration import batches, find_manifest, resolve
from hadaptive_q.data.datasets import ImageData
from hadaptive_q.data.sources import open_data
from hadaptive_q.finished import find_finished
from hadaptive_q.lower.parity import agreement, compare, sqnr_db, top1
from hadaptive_q.lower.runtime import PteFile
from hadaptive_q.models.checkpoint import load_model
from hadaptive_q.models.network import Network
from hadaptive_q.pipeline import quantize
from hadaptive_q.recipe import Recipe
from hadaptive_q.report.record import Report
from hadaptive_q.train.loop import predict

ROOT = Path(__file__).parent.parent
RESULTS, README = ROOT / "benchmarks" / "results", ROOT / "README.md"

Row = dict[str, Any]


def run(recipe: Recipe, folder: Path, checkpoint: Path | None) -> Row:
    """Return the figures of `recipe`, run into `folder` unless that very run is there."""
    return _shown(_from_report(find_finished(recipe, folder, checkpoint) or quantize(recipe, folder, checkpoint)))


def _from_report(report: Report) -> Row:
    choosing = [ach for ach in report.ach if ach.selection == "dynamic"]
    return {
        "model": report.model,
        "data": report.data,
        "seed": report.seed,
        "recipe": report.recipe,
        "float_top1": report.accuracy.float_top1,
        "program_top1": report.accuracy.quantized_top1,
        "file_top1": report.accuracy.pte_top1,
        "file_program_agreement": report.parity.top1_agreement,
        "file_program_sqnr_db": report.parity.sqnr_db,
        "file_integers_identical": report.parity.integer_identical,
        "file_frozen_agreement": report.parity.frozen_agreement,
        "file_frozen_sqnr_db": report.parity.frozen_sqnr_db,
        "file_float_agreement": report.parity.float_agreement,
        "file_float_sqnr_db": report.parity.float_sqnr_db,
        "set_flip_rate": statistics.fmean(a.flip_rate for a in choosing) if choosing else 0.0,
        "rank_flip_rate": statistics.fmean(a.rank_flip_rate for a in choosing) if choosing else 0.0,
        "bytes": report.size.pte_bytes,
        "float_bytes": report.size.float_pte_bytes,
        "samples": report.accuracy.samples,
    }


def stock_row(data_name: str, seed: int, checkpoint: Path, kept: Path) -> Row:
    """Return the figures of the stock recipe on the same float model, calibrated on the very same samples."""
    if kept.is_file():
        return _shown(json.loads(kept.read_text()))
    model, data, samples = _stock_case(data_name, checkpoint)
    preprocess = data.preprocess
    program, file = stock_int8(model, samples, preprocess.image_size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stock.pte"
        write_bytes(path, file)
        shipped = PteFile(path).predict(data.val, preprocess)
    reference, labels = predict(model, data.val, preprocess)
    converted, _ = predict(program, data.val, preprocess)
    parity = compare(converted, shipped, 1.0)
    row = {
        "model": model.config.name,
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
    return _shown(row)


def stock_int4_row(data_name: str, seed: int, checkpoint: Path, kept: Path) -> Row:
    """Return the figures of the stock recipe with 4-bit weights; it makes a program, but no file that loads."""
    if kept.is_file():
        return _shown(json.loads(kept.read_text()))
    model, data, samples = _stock_case(data_name, checkpoint)
    preprocess = data.preprocess
    program = stock_int4(model, samples, preprocess.image_size)
    reference, labels = predict(model, data.val, preprocess)
    converted, _ = predict(program, data.val, preprocess)
    row = {
        "model": model.config.name,
        "data": data.name,
        "seed": seed,
        "recipe": "stock_int4",
        "float_top1": top1(reference, labels),
        "program_top1": top1(converted, labels),
        "file_top1": None,
        "program_float_agreement": agreement(reference, converted),
        "program_float_sqnr_db": sqnr_db(reference, converted),
        "samples": len(labels),
    }
    write_text(kept, json.dumps(row))
    return _shown(row)


def _stock_case(data_name: str, checkpoint: Path) -> tuple[Network, ImageData, Iterable[Tensor]]:
    """Return the float network, the data as it was trained to see it, and the calibration samples of our recipes."""
    model = load_model(checkpoint)
    assert model.preprocess is not None
    data = open_data(data_name, model.preprocess.image_size)
    manifest = resolve(find_manifest("auto", data), data)
    samples = batches(manifest, data, 64)
    return model, replace(data, preprocess=model.preprocess), samples


def _shown(row: Row) -> Row:
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def write_results(name: str, rows: list[Row]) -> None:
    """Keep `rows` as results/NAME.json."""
    with output_folder(RESULTS):
        write_text(RESULTS / f"{name}.json", json.dumps(rows, indent=1) + "\n")


def read_results(name: str) -> list[Row]:
    """Return the rows of results/NAME.json, none where there is no such file."""
    path = RESULTS / f"{name}.json"
    rows: list[Row] = json.loads(path.read_text()) if path.is_file() else []
    return rows


def write_section(name: str, table: Callable[[list[Row]], str], page: Path = README) -> None:
    """Write the table of results/NAME.json between its marks in `page`."""
    write_table(name, table(read_results(name)), page)


def write_table(name: str, table: str, page: Path) -> None:
    """Write `table` between the marks of NAME in `page`."""
    start, end = f"<!-- results:{name} -->", f"<!-- /results:{name} -->"
    before, rest = page.read_text().split(start)
    write_text(page, f"{before}{start}\n{table}\n{end}{rest.split(end)[1]}")


def markdown(columns: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """Return a table of texts."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ("---",) * len(columns), *lines))


def flips(sets: float, ranks: float) -> str:
    """Return both flip rates as a cell."""
    return f"{100 * sets:.1f} / {100 * ranks:.1f} %"


def write_robustness(name: str, lines: list[tuple[str, ...]]) -> None:
    """Keep what was tried and what became of it as results/NAME.json, and write the table of docs/robustness.md."""
    columns = ("tried", "how often", "what happened")
    rows: list[Row] = [dict(zip(columns, line, strict=True)) for line in lines]
    write_results(name, rows)
    write_table(name, markdown(columns, lines), ROOT / "docs" / "robustness.md")
