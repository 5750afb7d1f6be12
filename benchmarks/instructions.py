"""Instructions per inference of our files beside the stock tools', on one emulated core, in one run.

    python benchmarks/instructions.py --model hadaptive_net_s --core cortex-a76

Random weights and inputs: the count does not depend on them. Per-sample selection, batch 1, one thread.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from stock import stock_float, stock_int8

from hadaptive_q.arm.count import count_instructions
from hadaptive_q.lower.executorch import lower
from hadaptive_q.models.config import VARIANTS, Preprocess
from hadaptive_q.models.hadaptive_net import HadaptiveNet, create_model
from hadaptive_q.quant.backends import torchao_pt2e as backend
from hadaptive_q.quant.plan import make_plan
from hadaptive_q.quant.program import export_graph
from hadaptive_q.recipe import QuantizeConfig
from hadaptive_q.rewrite.deploy import deploy_graph
from hadaptive_q.rewrite.drop_no_ops import drop_no_ops

CLASSES, BATCH = 100, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="hadaptive_net_s", choices=VARIANTS)
    parser.add_argument("--core", action="append", default=[])
    parser.add_argument("--image-size", type=int, default=224)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = create_model(arguments.model, CLASSES)
    inputs = torch.randn(BATCH, 3, arguments.image_size, arguments.image_size)
    with torch.no_grad():
        model.train()(inputs)  # running statistics that belong to the weights
    forms: dict[str, Callable[[], bytes]] = {
        "stock float": lambda: stock_float(model, arguments.image_size),
        "float": lambda: _float(model, arguments.image_size),
        "stock int8": lambda: stock_int8(model, [inputs], arguments.image_size)[1],
        "int8": lambda: _int8(model, inputs),
    }
    print("| file | bytes | core | instructions |")
    print("| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for name, make in forms.items():
            path = Path(folder) / "file.pte"
            path.write_bytes(make())
            for core in arguments.core or ["cortex-a76"]:
                total = count_instructions(path, core).total
                print(f"| {name} | {path.stat().st_size:,} | {core} | {total:,} |", flush=True)


def _float(model: HadaptiveNet, image_size: int) -> bytes:
    graph = deploy_graph(model, image_size)
    drop_no_ops(graph)
    return lower(export_graph(graph, image_size)).data


def _int8(model: HadaptiveNet, inputs: torch.Tensor) -> bytes:
    size = inputs.shape[-1]
    graph = deploy_graph(model, size)
    prepared = backend.prepare(graph, make_plan(graph, QuantizeConfig()), "minmax")
    classes = tuple(str(label) for label in range(CLASSES))
    preprocess = Preprocess(image_size=size, mean=(0.5,) * 3, std=(0.5,) * 3, classes=classes)
    return lower(backend.convert(backend.calibrate(prepared, [inputs]), preprocess).export()).data


if __name__ == "__main__":
    main()
