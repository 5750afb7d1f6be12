"""Element-wise products of what layers made: planned, multiplied in codes, and the same in the file, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from hadaptive_q.lower.executorch import lower
from hadaptive_q.lower.parity import sqnr_db
from hadaptive_q.lower.runtime import PteFile
from hadaptive_q.models.config import FAMILIES, Preprocess
from hadaptive_q.models.families import create_model
from hadaptive_q.quant import arithmetic
from hadaptive_q.quant.backends import torchao_pt2e as backend
from hadaptive_q.quant.interpreter import IntegerProgram
from hadaptive_q.quant.plan import make_plan
from hadaptive_q.quant.program import QuantizedProgram
from hadaptive_q.quant.sites import quantizer_of
from hadaptive_q.recipe import QuantizeConfig
from hadaptive_q.rewrite.deploy import deploy_graph
from hadaptive_q.rewrite.graph import CLAMPS, aten, calls

SIZE = 32
PREPROCESS = Preprocess(image_size=SIZE, mean=(0.5,) * 3, std=(0.5,) * 3, classes=tuple("0123456789"))
# Selections and attention are float arithmetic.
OTHERS = [f"{family}_nano" for family in FAMILIES if family not in ("hadaptive_net", "s2aformer")]


class Products(nn.Module):
    """Every kind of product: of two branches, with a clamp behind it, with a gate over pixels, of a sum; and a clamp
    whose codes reach beyond it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.one, self.other, self.gate = (nn.Conv2d(8, 8, 1) for _ in range(3))
        self.last = nn.Linear(8, 10)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        one, other = nn.functional.relu6(self.one(x)), self.other(x)
        gate = nn.functional.hardsigmoid(self.gate(x.mean((-1, -2), keepdim=True)))
        # Read as an addition of what layers made: products are such, too.
        total = (one * other).relu() + gate * other
        return self.last((total * other).mean((-1, -2), keepdim=True).flatten(1))


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def calibrated(graph: GraphModule, observer: str = "minmax") -> backend.Calibrated:
    prepared = backend.prepare(graph, make_plan(graph, QuantizeConfig()), observer)  # type: ignore[arg-type]
    return backend.calibrate(prepared, [images(16)])


def test_operands_and_results_are_planned_once() -> None:
    graph = deploy_graph(Products().eval(), SIZE)
    plan = make_plan(graph, QuantizeConfig())
    products = list(calls(graph, aten.mul.Tensor))
    assert len(products) == 3
    for product in products:
        assert all(operand.name in plan.activations for operand in product.all_input_nodes)
    # What only a clamp reads is stored behind it, and nowhere else.
    clamped = list(calls(graph, *CLAMPS))
    assert len(clamped) == 3
    assert all(c.name in plan.activations and c.args[0].name not in plan.activations for c in clamped)  # type: ignore[union-attr]
    assert not plan.shared.keys() & {node.name for node in (*products, *clamped)}


def test_products_with_constants_and_of_selected_channels_stay_in_float(nano_graph: GraphModule) -> None:
    plan = make_plan(nano_graph, QuantizeConfig())
    products = list(calls(nano_graph, aten.mul.Tensor))
    assert products
    assert not plan.activations.keys() & {product.name for product in products}


def logits_of_file(program: QuantizedProgram, integers: IntegerProgram, x: Tensor, folder: Path) -> Tensor:
    """Return the logits of the written file, which is one delegate of integers that answers as the interpreter does."""
    lowered = lower(program.export())
    assert (lowered.coverage.delegates, lowered.coverage.portable_ops, lowered.coverage.fp32_ops) == (1, (), ())
    (folder / "model.pte").write_bytes(lowered.data)
    file = PteFile(folder / "model.pte")
    found = torch.cat([file(image[None]) for image in x])
    assert torch.equal(found, integers(x))
    return found


def test_every_kind_of_product_in_the_file(tmp_path: Path) -> None:
    ready = calibrated(deploy_graph(Products().eval(), SIZE))
    (clamp,) = calls(ready.graph, aten.relu6.default)
    # A scale that was learned may reach beyond the clamp: codes above it must not occur.
    quantizer = quantizer_of(ready.graph, clamp.name)
    quantizer.set_range(torch.tensor(0.0), torch.tensor(9.0))
    program = backend.convert(ready, PREPROCESS)
    integers = IntegerProgram(program)
    x = torch.cat((images(8, 1), images(4, 2) * 30, torch.zeros(1, 3, SIZE, SIZE)))
    codes = integers.codes(x, [clamp.name])[clamp.name]
    assert int(codes.max()) == round(6 / (9 / 255)) - 128
    targets = [node.target for node in integers.graph.graph.nodes]
    assert targets.count(arithmetic.multiply) == 3
    assert not integers.coverage.floating
    found = logits_of_file(program, integers, x, tmp_path)
    assert len(found.unique()) > 20


@pytest.mark.parametrize("name", OTHERS)
def test_the_whole_network_is_one_delegate_of_integers(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model(name, 10)
    with torch.no_grad():
        for _ in range(20):
            model.train()(images(16))
    graph = deploy_graph(model.eval(), SIZE)
    program = backend.convert(calibrated(graph), PREPROCESS)
    integers, x = IntegerProgram(program), images(8, 1)
    assert not integers.coverage.floating
    found = logits_of_file(program, integers, x, tmp_path)
    with torch.no_grad():
        assert sqnr_db(model(x), found) > 20
