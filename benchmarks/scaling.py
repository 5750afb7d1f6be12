"""Training throughput, one command per row; every ratio is of steps timed in turns within one run.

    python benchmarks/scaling.py --row step-64

A row is a function in ROWS that returns table lines; results/scaling.json keeps them and docs/training.md shows them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
    XNNPACKQuantizer,
    get_symmetric_quantization_config,
)
from rows import ROOT, Row, markdown, read_results, write_results, write_section
from torch import Tensor, nn
from torchao.quantization.pt2e import move_exported_model_to_train
from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

from hadaptive_q.models.families import create_model
from hadaptive_q.models.network import Network
from hadaptive_q.quant.backends import torchao_pt2e as backend
from hadaptive_q.quant.plan import make_plan
from hadaptive_q.recipe import FitConfig, QuantizeConfig, TrainConfig
from hadaptive_q.rewrite.deploy import deploy_graph
from hadaptive_q.train.losses import fit_loss, float_loss
from hadaptive_q.train.observe import ObservedGraph, ObservedModel

CLASSES, ROUNDS, WARMUP = 100, 5, 1
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Step = Callable[[], None]
COLUMNS = ("step", "where", "images per second", "time of the float step")


def step_64() -> list[Row]:
    """S at 64x64, batch 64: float, QAT with and without its teacher, with learned ranges, and stock QAT."""
    return _steps("hadaptive_net_s", 64, 64)


def step_224() -> list[Row]:
    """S at 224x224, batch 16."""
    return _steps("hadaptive_net_s", 224, 16)


ROWS: dict[str, Callable[[], list[Row]]] = {"step-64": step_64, "step-224": step_224}


def _steps(name: str, size: int, batch: int) -> list[Row]:
    torch.manual_seed(0)
    inputs = torch.randn(batch, 3, size, size)
    labels = torch.randint(CLASSES, (batch,)).to(DEVICE)
    steps = {
        "float": _float(create_model(name, CLASSES), inputs, labels),
        "QAT, no teacher": _qat(create_model(name, CLASSES).eval(), inputs, labels, 0.0),
        "QAT, with its float teacher": _qat(create_model(name, CLASSES).eval(), inputs, labels, 1.0),
        "QAT, ranges learned, no teacher": _qat(create_model(name, CLASSES).eval(), inputs, labels, 0.0, learned=True),
        "stock PT2E QAT": _stock(create_model(name, CLASSES), inputs, labels),
    }
    times: dict[str, list[float]] = {title: [] for title in steps}
    for turn in range(ROUNDS + WARMUP):
        for title, step in steps.items():
            seconds = _timed(step)
            if turn >= WARMUP:
                times[title].append(seconds)
    where = f"{name.removeprefix('hadaptive_net_').upper()}, {size}x{size}, batch {batch}, {_machine()}"
    lines = []
    for title, taken in times.items():
        ratio = statistics.median(b / a for a, b in zip(times["float"], taken, strict=True))
        speed = batch / statistics.median(taken)
        lines.append(dict(zip(COLUMNS, (title, where, f"{speed:.0f}", f"{ratio:.2f}"), strict=True)))
    return lines


def _machine() -> str:
    return torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def _timed(step: Step) -> float:
    start = time.perf_counter()
    step()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _step(model: nn.Module, loss: Callable[[], Tensor]) -> Step:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def _float(model: Network, inputs: Tensor, labels: Tensor) -> Step:
    student = ObservedModel(model.train()).to(DEVICE)
    loss, images = float_loss(TrainConfig(epochs=1, lr=1e-5), student), inputs.to(DEVICE)
    return _step(student, lambda: loss(student, images, labels))


def _qat(teacher: Network, inputs: Tensor, labels: Tensor, distill: float, learned: bool = False) -> Step:
    size = inputs.shape[-1]
    graph = deploy_graph(create_model(teacher.config.name, CLASSES).eval(), size)
    prepared = backend.prepare(graph, make_plan(graph, QuantizeConfig()), "minmax")
    calibrated = backend.calibrate(prepared, [inputs[:8]])
    backend.start_fit(calibrated, learned=learned)
    student = ObservedGraph(calibrated.graph).to(DEVICE)
    images = inputs.to(DEVICE)
    loss = fit_loss(FitConfig(epochs=1, lr=1e-5, distill=distill), ObservedModel(teacher).to(DEVICE))
    return _step(student, lambda: loss(student, images, labels))


def _stock(model: nn.Module, inputs: Tensor, labels: Tensor) -> Step:
    config = get_symmetric_quantization_config(is_per_channel=True, is_qat=True)
    example = (torch.zeros(2, *inputs.shape[1:]),)
    shapes = ({0: torch.export.Dim("batch", min=1, max=1024)},)
    exported = torch.export.export(model.eval(), example, dynamic_shapes=shapes).module()
    prepared = prepare_qat_pt2e(exported, XNNPACKQuantizer().set_global(config))
    move_exported_model_to_train(prepared)
    prepared.to(DEVICE)
    images = inputs.to(DEVICE)
    return _step(prepared, lambda: F.cross_entropy(prepared(images), labels, label_smoothing=0.1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--row", choices=ROWS, required=True)
    name = parser.parse_args().row
    made = [{"row": name, **line} for line in ROWS[name]()]
    kept = [line for line in read_results("scaling") if line["row"] != name]
    write_results("scaling", [*kept, *made])
    write_section("scaling", _table, ROOT / "docs" / "training.md")
    print(_table(made))


def _table(rows: list[Row]) -> str:
    return markdown(COLUMNS, [tuple(str(row[column]) for column in COLUMNS) for row in rows])


if __name__ == "__main__":
    main()
