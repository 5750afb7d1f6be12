from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from hadaptive_q.models.hadaptive_net import HadaptiveNet
from hadaptive_q.rewrite.fold_batch_norm import fold_batch_norm
from hadaptive_q.rewrite.graph import aten, calls, trace
from hadaptive_q.rewrite.merge_convolutions import merge_convolutions
from hadaptive_q.rewrite.sink_concat import sink_concat

Check = Callable[[Tensor, Tensor], None]
SIZE = 16
IMAGES = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def merged(model: nn.Module) -> tuple[GraphModule, int]:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    graph = trace(model, SIZE)
    return graph, merge_convolutions(graph)


def convolutions(graph: GraphModule) -> list[tuple[int, ...]]:
    """Return the kernels' shapes."""
    shapes = {name: tuple(p.shape) for name, p in graph.named_parameters()}
    return [shapes[str(node.args[1].target)] for node in calls(graph, aten.conv2d.default)]  # type: ignore[union-attr]


def test_the_stem_of_the_nano_network(
    nano: HadaptiveNet, nano_traced: GraphModule, inputs: Tensor, assert_float_equal: Check
) -> None:
    fold_batch_norm(nano_traced)
    before = len(convolutions(nano_traced))
    # The 1x1 convolutions of ACH feed a depthwise one too; only the stem's first has one reader and no activation.
    assert merge_convolutions(nano_traced) == 1
    assert len(convolutions(nano_traced)) == before - 1
    assert convolutions(nano_traced)[0] == (12, 3, 4, 4)
    with torch.no_grad():
        assert_float_equal(nano_traced(inputs), nano(inputs))


def test_the_ghost_blocks_of_stride_two(
    nano: HadaptiveNet, nano_traced: GraphModule, inputs: Tensor, assert_float_equal: Check
) -> None:
    fold_batch_norm(nano_traced)
    sink_concat(nano_traced)  # now the cheap convolution feeds its own part of the depthwise one and nothing else
    assert merge_convolutions(nano_traced) == 1 + sum(b.depthwise.conv.stride == (2, 2) for b in nano.blocks) == 3
    with torch.no_grad():
        assert_float_equal(nano_traced(inputs), nano(inputs))


@pytest.mark.parametrize(
    ("first", "second", "kernel", "stride"),
    [
        ((2, 2), (2, 2), 4, 4),  # the stem
        ((3, 1), (2, 2), 4, 2),
        ((1, 1), (3, 1), 3, 1),
        ((3, 2), (1, 1), 3, 2),
        ((3, 2), (2, 3), 5, 6),
        ((1, 3), (2, 2), 4, 6),  # strides over what the first never reads
    ],
)
@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True), (False, False)])
def test_two_convolutions_become_one(
    first: tuple[int, int],
    second: tuple[int, int],
    kernel: int,
    stride: int,
    biases: tuple[bool, bool],
    assert_float_equal: Check,
) -> None:
    # Many channels between few: merging saves work whatever the kernels.
    model = nn.Sequential(nn.Conv2d(3, 40, *first, bias=biases[0]), nn.Conv2d(40, 2, *second, bias=biases[1]))
    graph, count = merged(model)
    assert count == 1
    assert convolutions(graph) == [(2, 3, kernel, kernel)]
    (node,) = calls(graph, aten.conv2d.default)
    assert node.args[3] == [stride, stride]
    assert_float_equal(graph(IMAGES), model(IMAGES))


def test_kernels_and_strides_need_not_be_square(assert_float_equal: Check) -> None:
    model = nn.Sequential(nn.Conv2d(3, 40, (1, 3), (1, 2)), nn.Conv2d(40, 2, (2, 1), (3, 1)))
    graph, count = merged(model)
    assert (count, convolutions(graph)) == (1, [(2, 3, 2, 3)])
    assert_float_equal(graph(IMAGES), model(IMAGES))


@pytest.mark.parametrize("padding", [1, 2, (1, 0)])
def test_the_first_may_be_padded(padding: int | tuple[int, int], assert_float_equal: Check) -> None:
    model = nn.Sequential(nn.Conv2d(3, 40, 3, padding=padding), nn.Conv2d(40, 2, 2, 2))
    graph, count = merged(model)
    assert (count, convolutions(graph)) == (1, [(2, 3, 4, 4)])
    assert_float_equal(graph(IMAGES), model(IMAGES))


@pytest.mark.parametrize("biases", [(True, True), (False, False)])
@pytest.mark.parametrize(
    ("first", "second", "kernel"), [((3, 1, 1), (2, 2), 4), ((2, 2, 0), (2, 2), 4), ((3, 2, 1), (1, 1), 3)]
)
def test_two_depthwise_convolutions_become_one(
    first: tuple[int, int, int],
    second: tuple[int, int],
    kernel: int,
    biases: tuple[bool, bool],
    assert_float_equal: Check,
) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 3, *first, groups=3, bias=biases[0]), nn.Conv2d(3, 3, *second, groups=3, bias=biases[1])
    )
    graph, count = merged(model)
    assert (count, convolutions(graph)) == (1, [(3, 1, kernel, kernel)])
    assert_float_equal(graph(IMAGES), model(IMAGES))


def test_a_chain_becomes_one(assert_float_equal: Check) -> None:
    model = nn.Sequential(nn.Conv2d(3, 40, 2, 2), nn.Conv2d(40, 40, 2, 2), nn.Conv2d(40, 2, 2, 1))
    graph, count = merged(model)
    assert (count, convolutions(graph)) == (2, [(2, 3, 8, 8)])
    assert_float_equal(graph(IMAGES), model(IMAGES))


class Functional(nn.Module):
    """Scalars for stride and padding, as `F.conv2d` allows."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Parameter(torch.zeros(40, 3, 2, 2)), nn.Parameter(torch.zeros(2, 40, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, self.one, stride=2), self.two, stride=2, padding=0)


def test_scalars_for_settings(assert_float_equal: Check) -> None:
    model = Functional()
    graph, count = merged(model)
    assert (count, convolutions(graph)) == (1, [(2, 3, 4, 4)])
    assert_float_equal(graph(IMAGES), model(IMAGES))


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 40, 1), nn.Conv2d(40, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return self.two(y) + y.mean()


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(3, 40, 1), nn.Conv2d(40, 2, 3, padding=1)),
        nn.Sequential(nn.Conv2d(3, 40, 2, dilation=2), nn.Conv2d(40, 2, 1)),
        nn.Sequential(nn.Conv2d(3, 42, 1, groups=3), nn.Conv2d(42, 2, 1)),
        nn.Sequential(nn.Conv2d(3, 40, 1), nn.Conv2d(40, 40, 2, groups=40)),
        nn.Sequential(nn.Conv2d(3, 40, 1), nn.ReLU(), nn.Conv2d(40, 2, 1)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 40, 3)),
        nn.Sequential(nn.Conv2d(3, 3, 5, groups=3), nn.Conv2d(3, 3, 2, 2, groups=3)),
        nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.Conv2d(6, 6, 2, 2, groups=6)),
        TwoReaders(),
    ],
    ids=(
        *("second padded", "dilated", "grouped", "depthwise after dense", "activation between", "dearer"),
        *("more taps than kernels have", "two filters a channel", "two readers"),
    ),
)
def test_where_it_is_inexact_or_dearer_nothing_is_merged(model: nn.Module) -> None:
    graph, count = merged(model)
    assert count == 0
    assert len(convolutions(graph)) == 2
    # Untouched, so equal to the last bit.
    assert torch.equal(graph(IMAGES), model(IMAGES))


def test_the_merged_convolution_trains() -> None:
    graph, _ = merged(nn.Sequential(nn.Conv2d(3, 40, 2, 2), nn.Conv2d(40, 2, 2, 2)))
    graph(IMAGES).square().sum().backward()
    gradients = [p.grad for p in graph.parameters()]
    assert len(gradients) == 2, "the old kernels are gone"
    assert all(g is not None and g.any() for g in gradients)
