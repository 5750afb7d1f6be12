"""Sink a BatchNorm that has no convolution before it into the layers behind it.

Formula: with ``y = g x + t`` per channel, ``W y + b = (W g) x + (b + W t)``. A mean over pixels, flattening and dropout
between change nothing, as g and t are one for all pixels. A convolution must not pad where t is not 0: it would pad x
instead of y. It is dense or depthwise.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from hadaptive_q.rewrite.fold_batch_norm import norm_affine
from hadaptive_q.rewrite.graph import add_parameter, aten, calls, constant, conv_settings, finish, is_depthwise

_BETWEEN = (aten.mean.dim, aten.flatten.using_ints, aten.dropout.default)


def sink_batch_norm(graph: GraphModule) -> int:
    """Sink every such BatchNorm in place and return how many there were."""
    count = 0
    for node in calls(graph, aten.batch_norm.default):
        source = node.args[0]
        assert isinstance(source, Node)
        scale, shift = norm_affine(graph, node)
        layers = _layers_behind(graph, node, bool(shift.any()))
        if source.target == aten.conv2d.default or not layers:
            continue
        for layer in layers:
            _fold(graph, layer, scale, shift)
        node.replace_all_uses_with(source)
        count += 1
    finish(graph)
    return count


def _layers_behind(graph: GraphModule, node: Node, shifted: bool) -> list[Node]:
    """Return the layers that read `node`, or nothing where anything else does, too."""
    found: list[Node] = []
    for user in node.users:
        taken = [user] if _takes_in(graph, user, shifted) else []
        inner = _layers_behind(graph, user, shifted) if _keeps_channels(user) else taken
        if not inner:
            return []
        found += inner
    return found


def _keeps_channels(node: Node) -> bool:
    if node.target == aten.mean.dim:
        return sorted(axis % 4 for axis in node.args[1]) == [2, 3]  # type: ignore[union-attr, operator]
    if node.target == aten.flatten.using_ints:
        # Of a map of one pixel: channels stay apart.
        return tuple(node.args[0].meta["val"].shape[2:]) == (1, 1)  # type: ignore[union-attr]
    return node.target in _BETWEEN


def _takes_in(graph: GraphModule, node: Node, shifted: bool) -> bool:
    if node.target not in (aten.conv2d.default, aten.linear.default) or constant(graph, node.args[1]) is None:
        return False
    if node.target == aten.linear.default:
        return True
    settings = conv_settings(node)
    return (settings.groups == 1 or is_depthwise(graph, node)) and not (shifted and any(settings.padding))


def _fold(graph: GraphModule, layer: Node, scale: Tensor, shift: Tensor) -> None:
    weight = constant(graph, layer.args[1])
    bias = constant(graph, layer.args[2]) if len(layer.args) > 2 else None
    assert weight is not None
    by_channel = (-1, 1, 1, 1) if is_depthwise(graph, layer) else (1, -1, *(1,) * (weight.dim() - 2))
    with torch.no_grad():
        moved = (weight * shift.reshape(by_channel)).flatten(1).sum(dim=1)
        name = str(layer.args[1])
        new_weight = add_parameter(graph, f"{name}_normed", weight * scale.reshape(by_channel), layer)
        new_bias = add_parameter(graph, f"{name}_normed_bias", moved if bias is None else bias + moved, layer)
    layer.args = (layer.args[0], new_weight, new_bias, *layer.args[3:])
