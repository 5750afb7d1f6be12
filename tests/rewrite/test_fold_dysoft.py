from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from hadaptive_q.models.ach import DySoft
from hadaptive_q.models.blocks import Bottleneck
from hadaptive_q.models.config import ACHConfig, Norm
from hadaptive_q.models.hadaptive_net import HadaptiveNet
from hadaptive_q.rewrite.fold_batch_norm import fold_batch_norm
from hadaptive_q.rewrite.fold_dysoft import fold_dysoft
from hadaptive_q.rewrite.graph import aten, calls, trace
from hadaptive_q.rewrite.sink_concat import sink_concat

Check = Callable[[Tensor, Tensor], None]
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 3


class Net(nn.Module):
    def __init__(self, norm: Norm = "dysoft") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 1)
        self.block = Bottleneck(8, ACHConfig(channels=8, cs=4, k=3, norm=norm), "rank")

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.first(x))


def folded(model: nn.Module, sunk: bool = True) -> tuple[GraphModule, int]:
    graph = trace(model.eval(), 8)
    fold_batch_norm(graph)
    if sunk:
        sink_concat(graph)
    return graph, fold_dysoft(graph)


@pytest.mark.parametrize("alpha", [0.5, -3.0])
@pytest.mark.parametrize("weights", ["ordinary", "negative", "small", "zero", "small bias"])
def test_any_dysoft_folds(alpha: float, weights: str, assert_float_equal: Check) -> None:
    model = Net()
    norm = model.block.expansion.norm
    assert isinstance(norm, DySoft)
    with torch.no_grad():
        norm.alpha.fill_(alpha)
        norm.bias.copy_(torch.linspace(-0.6, 0.6, 6).reshape(1, 6, 1, 1))
        if weights == "ordinary":
            norm.weight.uniform_(0.5, 1.5)
        elif weights == "negative":
            norm.weight.normal_()
        elif weights == "small":
            norm.weight.mul_(1e-3)
        elif weights == "zero":
            norm.weight[0, :3] = 0
            norm.bias[0, 1] = 0
        else:
            norm.bias.mul_(1e-6)
    graph, count = folded(model)
    assert count == 1
    with torch.no_grad():
        assert_float_equal(graph(IMAGES), model(IMAGES))


def test_what_is_stored_lies_within_two_whatever_was_trained() -> None:
    model = Net()
    norm = model.block.expansion.norm
    assert isinstance(norm, DySoft)
    with torch.no_grad():
        norm.weight.normal_(std=30)
        norm.bias.normal_(std=30)
    graph, _ = folded(model)
    depthwise = [n for n in calls(graph, aten.conv2d.default) if len(n.args) > 6 and n.args[6] == 6]
    (stored,) = {n.args[0] for n in depthwise}
    found: dict[str, Tensor] = {}

    class Look(Interpreter):
        def run_node(self, n: Node) -> object:
            result = super().run_node(n)
            if n is stored:
                found["it"] = result
            return result

    with torch.no_grad():
        Look(graph).run(IMAGES)
    assert 0.5 < float(found["it"].abs().max()) <= 2


def test_the_nano_network(
    nano: HadaptiveNet, nano_traced: GraphModule, inputs: Tensor, assert_float_equal: Check
) -> None:
    fold_batch_norm(nano_traced)
    sink_concat(nano_traced)
    assert fold_dysoft(nano_traced) == sum(isinstance(m, DySoft) for m in nano.modules()) == 2
    with torch.no_grad():
        assert_float_equal(nano_traced(inputs), nano(inputs))
    assert fold_dysoft(nano_traced) == 0


def test_slope_weight_and_bias_still_train() -> None:
    graph, _ = folded(Net())
    graph(IMAGES).square().sum().backward()
    without = {n for n, p in graph.named_parameters() if p.grad is None or not p.grad.any()}
    assert all("scorer" in name for name in without)
    assert any("slope" in name for name, _ in graph.named_parameters())
    assert any("shift" in name for name, _ in graph.named_parameters())


@pytest.mark.parametrize(("norm", "sunk"), [("batch_norm", True), ("dysoft", False)])
def test_another_norm_or_another_reader_stays(norm: Norm, sunk: bool, assert_float_equal: Check) -> None:
    """Before the concatenation has sunk, no depthwise convolution reads the products alone."""
    model = Net(norm)
    graph, count = folded(model, sunk)
    assert count == 0
    with torch.no_grad():
        assert_float_equal(graph(IMAGES), model(IMAGES))
