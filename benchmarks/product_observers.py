"""Range observers side by side: same float model, same calibration samples, same images, no training.

    python benchmarks/product_observers.py --checkpoint runs/int8/float.safetensors --data digits --images 512

For every observer and every way to select, the quantized network is compared with the float deploy graph: SQNR of the
operands, products and stored norms of every ACH, with the noise of all layers before it and alone, that is of its own
two ranges on float features; SQNR of the logits, and how often both name the same class. With frozen channels nothing
flips, so that the ranges alone are seen. Writes benchmarks/results/product_observers.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import typing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from hadaptive_q.atomic import output_folder, write_text
from hadaptive_q.data.calibration import batches, find_manifest, resolve
from hadaptive_q.data.datasets import ImageData
from hadaptive_q.data.sources import open_data
from hadaptive_q.data.transforms import normalise
from hadaptive_q.errors import UserError
from hadaptive_q.lower.parity import agreement, sqnr_db
from hadaptive_q.models.checkpoint import load_model
from hadaptive_q.models.network import Network
from hadaptive_q.quant.backends import torchao_pt2e as backend
from hadaptive_q.quant.observers import ObserverName
from hadaptive_q.quant.plan import make_plan
from hadaptive_q.quant.sites import quantizer_of
from hadaptive_q.recipe import QuantizeConfig
from hadaptive_q.report.measure import measure_ach
from hadaptive_q.rewrite.deploy import deploy_graph
from hadaptive_q.rewrite.freeze_selection import freeze_selection
from hadaptive_q.rewrite.products import Product, find_products, norm_of_products
from hadaptive_q.rewrite.record import record

RESULTS = Path(__file__).parent / "results" / "product_observers.json"
BATCH = 64
# Layers of a whole network for every image at once are what a small machine can hold of this many.
LAYER_IMAGES = 128
KEYS = ("own_operand_sqnr_db", "own_output_sqnr_db", "operand_sqnr_db", "product_sqnr_db", "output_sqnr_db")
COLUMNS = (
    *("selection", "observer", "X~ alone", "norms alone", "operands", "products", "norms"),
    *("logits", "same class", "calibration"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--images", type=int, default=512)
    arguments = parser.parse_args()
    model = load_model(arguments.checkpoint)
    if model.preprocess is None:
        raise UserError(f"checkpoint {arguments.checkpoint}", "no preprocessing", "a checkpoint with its preprocessing")
    data = open_data(arguments.data, model.preprocess.image_size)
    inputs = _spread(data, arguments.images)
    rows = [
        _row(model, data, inputs, selection, observer)
        for selection in ("static", "dynamic")
        for observer in typing.get_args(ObserverName)
    ]
    with output_folder(RESULTS.parent):
        write_text(RESULTS, json.dumps(rows, indent=1) + "\n")
    print(_table(rows))


def _spread(data: ImageData, count: int) -> Tensor:
    count = min(count, len(data.val))
    images = torch.stack([data.val[i * len(data.val) // count][0] for i in range(count)])
    return normalise(images, data.preprocess)


def _row(model: Network, data: ImageData, inputs: Tensor, selection: str, observer: ObserverName) -> dict[str, Any]:
    """Quantize `model` with one observer and compare."""
    manifest = resolve(find_manifest("auto", data), data)
    model = copy.deepcopy(model)
    if selection == "static":
        freeze_selection(model, batches(manifest, data, BATCH))
    graph = deploy_graph(model, data.preprocess.image_size)
    reference = copy.deepcopy(graph)
    prepared = backend.prepare(graph, make_plan(graph, QuantizeConfig()), observer)
    start = time.perf_counter()
    calibrated = backend.calibrate(prepared, batches(manifest, data, BATCH))
    seconds = time.perf_counter() - start
    with torch.no_grad():
        wanted, found = (torch.cat([g(part) for part in inputs.split(BATCH)]) for g in (reference, calibrated.graph))
    some = inputs[:: max(1, len(inputs) // LAYER_IMAGES)]
    own = {p.name: _own_sqnr(reference, calibrated.graph, p, some) for p in find_products(reference)}
    program = backend.convert(calibrated, data.preprocess)
    blocks = measure_ach(reference, program, some, {})
    return {
        "model": model.config.name,
        "data": data.name,
        "images": len(inputs),
        "selection": selection,
        "observer": observer,
        "blocks": [
            {
                "name": b.name,
                "operand_sqnr_db": b.operand_sqnr_db,
                "product_sqnr_db": b.product_sqnr_db,
                "output_sqnr_db": b.output_sqnr_db,
                **own[b.name],
            }
            for b in blocks
        ],
        "logit_sqnr_db": sqnr_db(wanted, found),
        "agreement": agreement(wanted, found),
        "calibration_seconds": seconds,
    }


def _own_sqnr(reference: GraphModule, quantized: GraphModule, product: Product, inputs: Tensor) -> dict[str, float]:
    """Return what the two ranges of one ACH cost by themselves: its quantizers on float features."""
    values = record(reference, inputs, {product.mixed, product.chosen, product.normed})
    mixed, normed = (quantizer_of(quantized, name) for name in (product.mixed, product.normed))
    with torch.no_grad():
        stored = normed(norm_of_products(reference, product)(mixed(values[product.chosen])))
        return {
            "own_operand_sqnr_db": sqnr_db(values[product.mixed], mixed(values[product.mixed])),
            "own_output_sqnr_db": sqnr_db(values[product.normed], stored),
        }


def _table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table; figures of blocks are their mean and the least."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"| {' | '.join('---' for _ in COLUMNS)} |"]
    for row in rows:
        figures = []
        for key in KEYS:
            values = [block[key] for block in row["blocks"]]
            figures.append(f"{statistics.fmean(values):.1f} (least {min(values):.1f}) dB")
        cells = (
            *(row["selection"], row["observer"], *figures, f"{row['logit_sqnr_db']:.2f} dB"),
            *(f"{100 * row['agreement']:.1f} %", f"{row['calibration_seconds']:.0f} s"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
