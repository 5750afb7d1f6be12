from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from hadaptive_q.rewrite.graph import aten, calls
from hadaptive_q.train.depthwise_gradient import conv2d
from hadaptive_q.train.observe import ObservedGraph

# Map, kernel, stride, padding, dilation: what `split_depthwise` and strides make of the last blocks, and stranger ones.
SHAPES: list[tuple[tuple[int, int], ...]] = [
    ((2, 2), (3, 7), (1, 1), (1, 3), (1, 1)),
    ((2, 2), (4, 4), (1, 1), (3, 3), (2, 2)),
    ((4, 4), (4, 5), (1, 1), (3, 2), (2, 1)),
    ((4, 4), (4, 4), (2, 2), (1, 1), (1, 1)),
    ((1, 3), (3, 3), (1, 1), (1, 1), (1, 1)),
    ((4, 3), (5, 5), (2, 1), (2, 1), (1, 1)),
]


@pytest.mark.parametrize("format_", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("map_", "kernel", "stride", "padding", "dilation"), SHAPES)
def test_values_and_gradients_are_torchs(
    map_: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, format_: torch.memory_format
) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(3, 4, *map_), torch.randn(4, 1, *kernel), torch.randn(4)]
    x, weight, bias = (leaf.double().requires_grad_() for leaf in leaves)
    answers = []
    for operator in (conv2d, aten.conv2d.default):
        out = operator(x.contiguous(memory_format=format_), weight, bias, stride, padding, dilation, 4)
        asked = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).double()
        answers.append((out, *torch.autograd.grad(out, (x, weight, bias), asked)))
    ours, wanted = answers
    assert type(ours[0].grad_fn).__name__ == "_DepthwiseBackward"
    assert torch.equal(ours[0], wanted[0])
    for got, right in zip(ours[1:], wanted[1:], strict=True):
        torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("map_", "kernel", "groups"), [((4, 4), (3, 3), 4), ((2, 2), (3, 3), 1), ((2, 2), (3, 3), 2)])
def test_larger_maps_and_other_convolutions_are_torchs_own(map_: Any, kernel: Any, groups: int) -> None:
    weight = torch.randn(4, 4 // groups, *kernel, requires_grad=True)
    out = conv2d(torch.randn(3, 4, *map_), weight, padding=(1, 1), groups=groups)
    assert type(out.grad_fn).__name__ == "ConvolutionBackward0"


def test_gradients_have_the_types_of_what_they_are_of() -> None:
    x = torch.randn(2, 3, 2, 2, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(3, 1, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = conv2d(x, weight, padding=(1, 1), groups=3)
    out.float().square().sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert (out.dtype, x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_a_trained_graph_has_them_and_the_graph_itself_does_not(nano_graph: GraphModule, inputs: Tensor) -> None:
    student = ObservedGraph(nano_graph)
    count = len(list(calls(nano_graph, aten.conv2d.default)))
    assert count == len(list(student.network.graph.find_nodes(op="call_function", target=conv2d))) > 20
    assert torch.equal(student(inputs).logits, nano_graph(inputs))
