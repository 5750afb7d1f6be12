"""Fold BatchNorm into the convolution before it; elsewhere turn it into a per-channel scale and shift.

Formula: ``g = gamma / sqrt(var + eps)``; ``W' = g W``, ``b' = g (b - mean) + beta``.
Folding before QAT leaves no BatchNorm whose epsilon, momentum or mode a later step could change.
A scale and shift keep gamma and beta in their last node's ``meta[AFFINE]``: what the norm makes of its input, mean
beta and deviation |gamma| by its own statistics, cannot be read from `g` and `b'`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from hadaptive_q.rewrite.graph import add_parameter, aten, calls, constant, finish

AFFINE = "batch_norm_affine"


def fold_batch_norm(graph: GraphModule) -> int:
    """Fold every BatchNorm in place and return how many there were."""
    count = 0
    for node in calls(graph, aten.batch_norm.default):
        scale, shift = norm_affine(graph, node)
        source = node.args[0]
        assert isinstance(source, Node)
        weight = constant(graph, source.args[1]) if source.target == aten.conv2d.default else None
        if weight is not None and len(source.users) == 1:
            _into_convolution(graph, source, weight, scale, shift)
            node.replace_all_uses_with(source)
        else:
            _as_affine(graph, node, source, scale, shift)
        count += 1
    finish(graph)
    return count


def norm_affine(graph: GraphModule, node: Node) -> tuple[Tensor, Tensor]:
    """Return the scale and the shift per channel, each `(C,)`, of the BatchNorm `node` in eval mode."""
    gamma, beta, mean, variance = (constant(graph, argument) for argument in node.args[1:5])
    assert mean is not None
    assert variance is not None
    epsilon = node.args[7]
    assert isinstance(epsilon, float)
    return affine(gamma, beta, mean, variance, epsilon)


def affine(
    gamma: Tensor | None, beta: Tensor | None, mean: Tensor, variance: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Return a BatchNorm in eval mode as a scale and a shift per channel, each `(C,)`."""
    scale = torch.rsqrt(variance + epsilon)
    if gamma is not None:
        scale = scale * gamma
    shift = -mean * scale
    return scale.detach(), (shift if beta is None else shift + beta).detach()


def _into_convolution(graph: GraphModule, conv: Node, weight: Tensor, scale: Tensor, shift: Tensor) -> None:
    bias = constant(graph, conv.args[2]) if len(conv.args) > 2 else None
    folded_bias = shift if bias is None else bias * scale + shift
    name = str(conv.args[1])
    new_weight = add_parameter(graph, f"{name}_folded", weight * scale.reshape(-1, 1, 1, 1), conv)
    new_bias = add_parameter(graph, f"{name}_bias", folded_bias, conv)
    conv.args = (conv.args[0], new_weight, new_bias, *conv.args[3:])


def _as_affine(graph: GraphModule, node: Node, source: Node, scale: Tensor, shift: Tensor) -> None:
    shape = (1, -1, *(1,) * (node.meta["val"].dim() - 2))
    scale_node = add_parameter(graph, f"{node.name}_scale", scale.reshape(shape), node)
    shift_node = add_parameter(graph, f"{node.name}_shift", shift.reshape(shape), node)
    with graph.graph.inserting_before(node):
        scaled = graph.graph.call_function(aten.mul.Tensor, (source, scale_node))
        shifted = graph.graph.call_function(aten.add.Tensor, (scaled, shift_node))
    for new in (scaled, shifted):
        new.meta = dict(node.meta)
    gamma, beta = (constant(graph, argument) for argument in node.args[1:3])
    ones = torch.ones_like(scale)
    shifted.meta[AFFINE] = (ones if gamma is None else gamma.detach(), ones * 0 if beta is None else beta.detach())
    node.replace_all_uses_with(shifted)
