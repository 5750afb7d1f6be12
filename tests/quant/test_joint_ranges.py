"""Ranges of a product's operands and result, chosen together: no worse for the product than each by itself."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hadaptive_q.lower.parity import sqnr_db
from hadaptive_q.quant.backends import torchao_pt2e as backend
from hadaptive_q.quant.joint_ranges import Multiplication
from hadaptive_q.quant.observers import ObserverName
from hadaptive_q.quant.plan import make_plan
from hadaptive_q.quant.sites import quantizer_of
from hadaptive_q.recipe import QuantizeConfig
from hadaptive_q.rewrite.deploy import deploy_graph
from hadaptive_q.rewrite.graph import aten, calls
from hadaptive_q.rewrite.record import record

SIZE = 16


class Star(nn.Module):
    """A product of two branches, the second of which is far below zero where the first is cut off; or of a gate."""

    def __init__(self, gate: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.one, self.other = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)
        self.last, self.gate = nn.Conv2d(16, 4, 1), gate
        with torch.no_grad():
            # Where the second is far below zero, the first is cut off.
            self.other.weight.copy_(self.one.weight * 3)
            self.one.bias.fill_(-0.5)
            self.other.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.gate:
            return self.last(x * nn.functional.hardsigmoid(self.one(x.mean((-1, -2), keepdim=True))))
        return self.last(nn.functional.relu6(self.one(x)) * self.other(x))


def images(seed: int) -> Tensor:
    return torch.randn(16, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def stored_product(model: nn.Module, observer: ObserverName) -> float:
    """Return the SQNR of the product as its three ranges store it, of float operands on images never seen."""
    graph = deploy_graph(model, SIZE)
    reference = copy.deepcopy(graph)
    prepared = backend.prepare(graph, make_plan(graph, QuantizeConfig()), observer)
    ready = backend.calibrate(prepared, [images(seed) for seed in range(4)]).graph
    names = [node.name for node in next(calls(reference, aten.mul.Tensor)).all_input_nodes]
    first, second = (quantizer_of(ready, name) for name in names)
    result = quantizer_of(ready, next(calls(reference, aten.mul.Tensor)).name)
    values = record(reference, images(9), set(names))
    a, b = (values[name] for name in names)
    with torch.no_grad():
        return sqnr_db(a * b, result(first(a) * second(b)))


def test_a_product_of_branches_keeps_its_tail() -> None:
    model = Star(gate=False).eval()
    found = stored_product(model, "product")
    # By itself, each operand clips what the product would multiply.
    assert found > stored_product(model, "histogram") + 3
    assert found > stored_product(model, "minmax") + 0.3


def test_a_gate_over_pixels() -> None:
    model = Star(gate=True).eval()
    assert stored_product(model, "product") > stored_product(model, "histogram") + 0.2


@pytest.mark.parametrize("gate", [True, False])
def test_an_operand_with_other_readers_counts_by_itself(gate: bool) -> None:
    graph = deploy_graph(Star(gate).eval(), SIZE)
    (found,) = backend.prepare(graph, make_plan(graph, QuantizeConfig()), "product").together
    assert isinstance(found, Multiplication)
    # What a gate multiplies is what it was computed from.
    assert found.apart == [gate, False]
    assert len(found.names) == 2


def test_other_observers_choose_every_range_by_itself() -> None:
    graph = deploy_graph(Star(gate=False).eval(), SIZE)
    assert not backend.prepare(graph, make_plan(graph, QuantizeConfig()), "histogram").together
