from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hadaptive_q.models.hadaptive_net import HadaptiveNet
from hadaptive_q.rewrite.fold_batch_norm import fold_batch_norm
from hadaptive_q.rewrite.graph import aten, calls, trace
from hadaptive_q.rewrite.split_depthwise import split_depthwise
from hadaptive_q.rewrite.tap_sets import MAX_TAPS

Check = Callable[[Tensor, Tensor], None]
IMAGES = torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(0))


def kernels(graph: torch.fx.GraphModule) -> list[tuple[int, int]]:
    shapes = {name: tuple(p.shape[2:]) for name, p in graph.named_parameters()}
    return [shapes[str(n.args[1].target)] for n in calls(graph, aten.conv2d.default)]  # type: ignore[union-attr, misc]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("kernel", "padding"),
    [
        (7, 3),
        (7, 2),
        (7, 1),
        (7, 5),
        (7, (3, 0)),
        (9, 4),
        (11, 5),
        ((5, 7), (2, 3)),
        ((7, 5), (3, 0)),
        ((3, 11), (1, 5)),
    ],
)
def test_a_large_kernel_is_a_sum_of_small_ones(
    kernel: int | tuple[int, int],
    padding: int | tuple[int, int],
    stride: int,
    bias: bool,
    assert_float_equal: Check,
) -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(3, 3, kernel, stride, padding, groups=3, bias=bias)
    graph = trace(model, 20)
    assert split_depthwise(graph) == 1
    assert all(height * width <= MAX_TAPS for height, width in kernels(graph))
    taps = model.kernel_size[0] * model.kernel_size[1]
    assert sum(height * width for height, width in kernels(graph)) == taps, "no multiplication is added"
    with torch.no_grad():
        assert_float_equal(graph(IMAGES), model(IMAGES))
    assert split_depthwise(graph) == 0


def test_the_nano_network(
    nano: HadaptiveNet, nano_traced: torch.fx.GraphModule, inputs: Tensor, assert_float_equal: Check
) -> None:
    fold_batch_norm(nano_traced)
    assert split_depthwise(nano_traced) == 1  # the 7x7 of its last stage
    assert (7, 7) not in kernels(nano_traced)
    with torch.no_grad():
        assert_float_equal(nano_traced(inputs), nano(inputs))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 3, 5, groups=3),
        nn.Conv2d(3, 4, 7),
        nn.Conv2d(3, 6, 7, groups=3),
        nn.Conv2d(3, 3, 8, groups=3),
        nn.Conv2d(3, 3, 7, dilation=2, groups=3),
        nn.Conv2d(3, 3, 7, groups=3),
        nn.Conv2d(3, 3, (7, 9), padding=(1, 0), groups=3),
    ],
    ids=["25 taps", "dense", "two filters a channel", "even", "dilated", "not padded", "hardly padded"],
)
def test_other_convolutions_stay(conv: nn.Conv2d) -> None:
    graph = trace(conv, 20)
    assert split_depthwise(graph) == 0
    assert torch.equal(graph(IMAGES), conv(IMAGES))
