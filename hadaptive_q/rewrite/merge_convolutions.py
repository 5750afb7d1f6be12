"""Merge two convolutions with nothing between them into one, where that saves work.

Formula: with ``y = W2 * (W1 * x + b1) + b2`` where the second has no padding, ``W[o, i] = sum_m W2[o, m] (*) W1[m, i]``
(full convolution of the kernels, the second dilated by the stride of the first), stride ``s1 s2``, padding ``p1``,
kernel ``k1 + (k2 - 1) s1``, ``b[o] = b2[o] + sum W2[o, m] b1[m]``. Exact, because an unpadded second convolution reads
nothing but results of the first. Both dense, or both depthwise.

In Hadaptive-Net these are the stem, whose first convolution has no activation (2x2/2 after 2x2/2 becomes one 4x4/4),
and every Ghost block of stride 2 (the cheap 3x3 and the 2x2/2 after it become one 4x4/2 at a quarter of the pixels).
That takes fewer multiply-accumulates, and every merge leaves one tensor less to quantize.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from hadaptive_q.rewrite.graph import add_parameter, aten, calls, constant, conv_settings, finish, is_depthwise
from hadaptive_q.rewrite.tap_sets import MAX_TAPS


def merge_convolutions(graph: GraphModule) -> int:
    """Merge in place and return how many convolutions went away."""
    count = 0
    for second in calls(graph, aten.conv2d.default):
        first = second.args[0]
        if isinstance(first, Node) and _mergeable(graph, first, second):
            _merge(graph, first, second)
            count += 1
    finish(graph)
    return count


def _mergeable(graph: GraphModule, first: Node, second: Node) -> bool:
    if first.target != aten.conv2d.default or len(first.users) != 1:
        return False
    w1, w2 = constant(graph, first.args[1]), constant(graph, second.args[1])
    if w1 is None or w2 is None:
        return False
    before, after = conv_settings(first), conv_settings(second)
    depthwise = is_depthwise(graph, first) and is_depthwise(graph, second)
    if not depthwise and not before.groups == after.groups == 1:
        return False
    if after.padding != [0, 0] or before.dilation != [1, 1] or after.dilation != [1, 1]:
        return False
    kernel = _kernel(w1, w2, before.stride)
    if depthwise and kernel[0].numel() > MAX_TAPS:
        return False
    separate = w1.numel() * _pixels(first) + w2.numel() * _pixels(second)
    return kernel.numel() * _pixels(second) < separate


def _pixels(conv: Node) -> int:
    shape = conv.meta["val"].shape
    return int(shape[2]) * int(shape[3])


def _kernel(w1: Tensor, w2: Tensor, stride: list[int]) -> Tensor:
    """Return the kernel of both: conv_transpose spreads each tap of the second over the taps of the first."""
    if w1.shape[1] == w2.shape[1] == 1 and w1.shape[0] == w2.shape[0]:
        channels = w1.shape[0]
        return F.conv_transpose2d(w2.transpose(0, 1), w1, stride=stride, groups=channels).transpose(0, 1)
    return F.conv_transpose2d(w2, w1, stride=stride)


def _merge(graph: GraphModule, first: Node, second: Node) -> None:
    w1, w2 = constant(graph, first.args[1]), constant(graph, second.args[1])
    b1, b2 = (constant(graph, conv.args[2]) if len(conv.args) > 2 else None for conv in (first, second))
    assert w1 is not None
    assert w2 is not None
    before, after = conv_settings(first), conv_settings(second)
    with torch.no_grad():
        kernel = _kernel(w1.double(), w2.double(), before.stride).float()
        bias = torch.zeros(w2.shape[0]) if b2 is None else b2.clone()
        if b1 is not None:
            taps = w2.sum((2, 3))
            bias += taps[:, 0] * b1 if before.groups > 1 else taps @ b1
    name = f"{second.args[1]}_merged"
    weight_node = add_parameter(graph, name, kernel, second)
    bias_node = add_parameter(graph, f"{name}_bias", bias, second)
    stride = [a * b for a, b in zip(before.stride, after.stride, strict=True)]
    second.args = (first.args[0], weight_node, bias_node, stride, before.padding, before.dilation, before.groups)
