"""Merge two convolutions with nothing between them into one, where that saves work.

Formula: with ``y = W2 * (W1 * x + b1) + b2`` and no padding, ``W[o, i] = sum_m W2[o, m] (*) W1[m, i]`` (full
convolution of the kernels, the second dilated by the stride of the first), stride ``s1 s2``, kernel
``k1 + (k2 - 1) s1``, ``b[o] = b2[o] + sum W2[o, m] b1[m]``. Exact without padding: padding would meet `b1`.

In Hadaptive-Net this is the stem: its first convolution has no activation. 2x2/2 after 2x2/2 becomes one
4x4/4, 131 M multiply-accumulates of S become 114 M, and one tensor less is quantized.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from hadaptive_q.rewrite.graph import add_parameter, aten, calls, constant, finish

_DEFAULTS: tuple[Any, ...] = (None, None, None, [1, 1], [0, 0], [1, 1], 1)


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


def _settings(conv: Node) -> tuple[Any, ...]:
    """Return stride, padding, dilation and groups with the defaults filled in."""
    return (*conv.args, *_DEFAULTS[len(conv.args) :])[3:7]


def _mergeable(graph: GraphModule, first: Node, second: Node) -> bool:
    if first.target != aten.conv2d.default or len(first.users) != 1:
        return False
    for conv in (first, second):
        _, padding, dilation, groups = _settings(conv)
        if list(padding) != [0, 0] or list(dilation) != [1, 1] or groups != 1:
            return False
    w1, w2 = constant(graph, first.args[1]), constant(graph, second.args[1])
    if w1 is None or w2 is None:
        return False
    separate = w1.numel() * _pixels(first) + w2.numel() * _pixels(second)
    return _kernel(w1, w2, _settings(first)[0]).numel() * _pixels(second) < separate


def _pixels(conv: Node) -> int:
    shape = conv.meta["val"].shape
    return int(shape[2]) * int(shape[3])


def _kernel(w1: Tensor, w2: Tensor, stride: Any) -> Tensor:
    # conv_transpose spreads each tap of the second kernel over the first: (O, M, k2, k2) -> (O, I, k, k).
    return F.conv_transpose2d(w2, w1, stride=tuple(stride))


def _merge(graph: GraphModule, first: Node, second: Node) -> None:
    w1, w2 = constant(graph, first.args[1]), constant(graph, second.args[1])
    b1, b2 = (constant(graph, conv.args[2]) if len(conv.args) > 2 else None for conv in (first, second))
    assert w1 is not None
    assert w2 is not None
    s1, s2 = _settings(first)[0], _settings(second)[0]
    with torch.no_grad():
        kernel = _kernel(w1.double(), w2.double(), s1).float()
        bias = torch.zeros(w2.shape[0]) if b2 is None else b2.clone()
        if b1 is not None:
            bias += w2.sum((2, 3)) @ b1
    name = f"{second.args[1]}_merged"
    weight_node = add_parameter(graph, name, kernel, second)
    bias_node = add_parameter(graph, f"{name}_bias", bias, second)
    second.args = (first.args[0], weight_node, bias_node, [a * b for a, b in zip(s1, s2, strict=True)])
