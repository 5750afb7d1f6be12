"""Fold DySoft's slope into the operands and its weight into the depthwise convolutions that read it.

Formula: with ``s = sqrt(|a|)``, ``u(x) = x / (1 + |x|)`` and, per slot, ``g = sign(a w) max(|w|, |b|)``:
``y = w u(a q) + b = g ((|w| / |g|) u((s Z_i)(s Z_j)) + b / g)``. The readers' filters take `g`; since `g` multiplies,
zero padding stays zero, which folding `b` would not allow. What is stored lies within ``|w| / |g| + |b| / |g| <= 2``
for every slot, whatever was trained, so one scale serves all slots. Where every ``|w| >= |b|``, the product with
``|w| / |g| = 1`` falls away.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from hadaptive_q.rewrite.gains import scale_operands, scale_readers
from hadaptive_q.rewrite.graph import add_parameter, aten, calls, finish, is_depthwise, split_constant

SMALLEST_GAIN = 2.0**-10


@dataclass(frozen=True)
class _Match:
    """``last = add(mul(weight, ratio), bias)`` with ``ratio = slope / (|slope| + 1)``, ``slope = alpha * product``."""

    last: Node
    ratio: Node
    slope: Node
    product: Node
    alpha: Tensor
    weight: Tensor
    bias: Tensor


def fold_dysoft(graph: GraphModule) -> int:
    """Fold every DySoft over an indexed product in place and return how many there were."""
    count = 0
    for node in calls(graph, aten.add.Tensor):
        match = _match(graph, node)
        if match is not None and all(is_depthwise(graph, user) for user in match.last.users):
            _fold(graph, match)
            count += 1
    finish(graph)
    return count


def stored_range(graph: GraphModule, stored: Node) -> tuple[float, float] | None:
    """Return the interval that a folded DySoft never leaves, whatever its input, or None if `stored` is none.

    Formula: ``[min_p (shift_p - share_p), max_p (shift_p + share_p)]``, as ``|u| < 1``.
    """
    outer = split_constant(graph, stored) if stored.target == aten.add.Tensor else None
    if outer is None:
        return None
    shift, ratio = outer
    share = torch.ones_like(shift)
    if ratio.target == aten.mul.Tensor:
        inner = split_constant(graph, ratio)
        if inner is None:
            return None
        share, ratio = inner
    if ratio.target != aten.div.Tensor:
        return None
    return float((shift - share.abs()).min()), float((shift + share.abs()).max())


def _match(graph: GraphModule, last: Node) -> _Match | None:
    outer = split_constant(graph, last)
    if outer is None or outer[1].target != aten.mul.Tensor:
        return None
    inner = split_constant(graph, outer[1])
    if inner is None or inner[1].target != aten.div.Tensor:
        return None
    slope = inner[1].args[0]
    if not isinstance(slope, Node) or slope.target != aten.mul.Tensor:
        return None
    scaled = split_constant(graph, slope)
    if scaled is None or scaled[0].numel() != 1 or scaled[1].target != aten.mul.Tensor:
        return None
    return _Match(last, inner[1], slope, scaled[1], scaled[0], inner[0], outer[0])


def fold_parameters(alpha: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gain ``g``, the share ``|w| / |g|`` and the shift ``b / g`` of every slot, shaped like `weight`."""
    size = torch.maximum(weight.abs(), bias.abs()).clamp_min(SMALLEST_GAIN)
    sign = torch.where(weight < 0, -1.0, 1.0) * torch.where(alpha < 0, -1.0, 1.0)
    gain = size * sign
    return gain, weight.abs() / size, bias / gain


def _fold(graph: GraphModule, match: _Match) -> None:
    with torch.no_grad():
        gain, rest, rest_of_bias = fold_parameters(match.alpha, match.weight, match.bias)
        scale_readers(graph, match.last, gain)
        scale_operands(graph, match.product, match.alpha.abs().sqrt().reshape(1))
    match.slope.replace_all_uses_with(match.product)
    shift = add_parameter(graph, f"{match.last.name}_shift", rest_of_bias, match.last)
    scaled = match.ratio
    with graph.graph.inserting_before(match.last):
        if not torch.equal(rest, torch.ones_like(rest)):
            share = add_parameter(graph, f"{match.last.name}_share", rest, match.last)
            scaled = graph.graph.call_function(aten.mul.Tensor, (match.ratio, share))
            scaled.meta = dict(match.last.meta)
        out = graph.graph.call_function(aten.add.Tensor, (scaled, shift))
    out.meta = dict(match.last.meta)
    match.last.replace_all_uses_with(out)
