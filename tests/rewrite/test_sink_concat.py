from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, cat, nn
from torch.fx import GraphModule

from hadaptive_q.models.hadaptive_net import HadaptiveNet
from hadaptive_q.rewrite.fold_batch_norm import fold_batch_norm
from hadaptive_q.rewrite.graph import aten, calls, trace
from hadaptive_q.rewrite.sink_concat import sink_concat

Check = Callable[[Tensor, Tensor], None]
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def sunk(model: nn.Module) -> tuple[GraphModule, int]:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    graph = trace(model, 8)
    return graph, sink_concat(graph)


def operators(graph: GraphModule) -> list[str]:
    return [str(n.target).split(".")[1] for n in graph.graph.nodes if n.op == "call_function"]


class AfterConcat(nn.Module):
    """Two maps of 3 and 5 channels, concatenated, and what follows."""

    def __init__(self, *after: nn.Module, axis: int = 1) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 5 if axis == 1 else 3, 1)
        self.after, self.axis = nn.Sequential(*after), axis

    def forward(self, x: Tensor) -> Tensor:
        return self.after(cat((self.one(x), self.two(x)), dim=self.axis))


def test_the_nano_network(
    nano: HadaptiveNet, nano_traced: GraphModule, inputs: Tensor, assert_float_equal: Check
) -> None:
    fold_batch_norm(nano_traced)
    blocks = len(nano.blocks)
    assert sink_concat(nano_traced) == 2 * blocks  # through the depthwise convolution and through the activation
    concats = list(calls(nano_traced, aten.cat.default))
    assert len(concats) == blocks
    for concat in concats:  # each now feeds its projection alone
        (user,) = concat.users
        assert user.target == aten.conv2d.default
        assert len(user.args) == 3, "a 1x1 convolution with every setting at its default"
    with torch.no_grad():
        assert_float_equal(nano_traced(inputs), nano(inputs))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("k", "s", "p"), [(3, 1, 1), (2, 2, 0), (5, 1, 2), (1, 1, 0)])
def test_a_depthwise_convolution_is_split(bias: bool, k: int, s: int, p: int, assert_float_equal: Check) -> None:
    model = AfterConcat(nn.Conv2d(8, 8, k, s, p, groups=8, bias=bias))
    graph, count = sunk(model)
    assert count == 1
    assert operators(graph) == ["conv2d", "conv2d", "conv2d", "conv2d", "cat"]
    assert [n.args[6] for n in calls(graph, aten.conv2d.default) if len(n.args) > 6] == [3, 5]
    assert_float_equal(graph(IMAGES), model(IMAGES))


@pytest.mark.parametrize("inplace", [False, True])
def test_an_activation_is_repeated(inplace: bool, assert_float_equal: Check) -> None:
    model = AfterConcat(nn.Hardswish(inplace=inplace))
    graph, count = sunk(model)
    assert count == 1
    assert operators(graph) == ["conv2d", "conv2d", "hardswish", "hardswish", "cat"]
    assert_float_equal(graph(IMAGES), model(IMAGES))


def test_a_concatenation_sinks_as_deep_as_it_can(assert_float_equal: Check) -> None:
    depthwise = [nn.Conv2d(8, 8, 3, padding=1, groups=8) for _ in range(2)]
    model = AfterConcat(nn.Hardswish(), depthwise[0], nn.Hardswish(), depthwise[1], nn.Conv2d(8, 4, 1))
    graph, count = sunk(model)
    assert count == 4
    assert operators(graph)[-2:] == ["cat", "conv2d"]
    assert_float_equal(graph(IMAGES), model(IMAGES))


class PartsReadElsewhere(nn.Module):
    """An in-place activation of the concatenation must not reach the parts, which are read once more."""

    def forward(self, x: Tensor) -> Tensor:
        one, two = x * 2, x - 1
        return nn.functional.hardswish(cat((one, two), dim=1), inplace=True) + cat((two, one), dim=1)


def test_parts_that_others_read_keep_their_values(assert_float_equal: Check) -> None:
    graph, count = sunk(PartsReadElsewhere())
    assert count == 1
    assert_float_equal(graph(IMAGES), PartsReadElsewhere()(IMAGES))


class ThreeParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(9, 9, 3, padding=1, groups=9)

    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise(cat((x, x * 2, x), dim=1))


def test_three_parts_of_which_two_are_one_tensor(assert_float_equal: Check) -> None:
    model = ThreeParts()
    graph, count = sunk(model)
    assert count == 1
    assert operators(graph) == ["mul", "conv2d", "conv2d", "conv2d", "cat"]
    assert_float_equal(graph(IMAGES), model(IMAGES))


class TwoReaders(AfterConcat):
    def forward(self, x: Tensor) -> Tensor:
        joined = cat((self.one(x), self.two(x)), dim=1)
        return self.after(joined) + joined


@pytest.mark.parametrize(
    "model",
    [
        AfterConcat(nn.Hardswish(), axis=2),
        AfterConcat(nn.Hardswish(), axis=0),
        TwoReaders(nn.Hardswish()),
        AfterConcat(nn.Conv2d(8, 4, 1)),
        AfterConcat(nn.Conv2d(8, 16, 3, groups=8)),
        AfterConcat(nn.Conv2d(8, 8, 1, groups=4)),
        AfterConcat(nn.Softmax(dim=1)),
    ],
    ids=["height", "batch", "two readers", "full convolution", "two filters a channel", "groups of two", "softmax"],
)
def test_what_mixes_parts_stays_where_it_is(model: nn.Module) -> None:
    graph, count = sunk(model)
    assert count == 0
    assert torch.equal(graph(IMAGES), model(IMAGES))


def test_split_parts_train_and_the_whole_is_gone() -> None:
    graph, _ = sunk(AfterConcat(nn.Conv2d(8, 8, 3, groups=8)))
    graph(IMAGES).square().sum().backward()
    depthwise = {n: p for n, p in graph.named_parameters() if "after" in n}
    assert sorted(p.shape[0] for p in depthwise.values()) == [3, 3, 5, 5]  # weight and bias of both parts
    assert all(p.grad is not None and p.grad.any() for p in depthwise.values())
