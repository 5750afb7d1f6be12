"""Fold the slope of a Hardsigmoid into the layer before it; what is left is a clamp.

Formula: ``hardsigmoid(W x + b) = clamp(x W / 6 + (b / 6 + 1 / 2), 0, 1)``. XNNPACK has no Hardsigmoid in int8, but its
layers clamp what they store at no cost; in codes for [0, 1], saturation does it.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from hadaptive_q.rewrite.graph import add_parameter, aten, calls, constant, finish

LAYERS = (aten.conv2d.default, aten.linear.default)


def fold_hardsigmoid(graph: GraphModule) -> int:
    """Fold every Hardsigmoid right behind a layer in place and return how many there were."""
    count = 0
    for node in calls(graph, aten.hardsigmoid.default, aten.hardsigmoid_.default):
        layer = node.args[0]
        assert isinstance(layer, Node)
        if layer.target in LAYERS and len(layer.users) == 1 and constant(graph, layer.args[1]) is not None:
            _fold(graph, layer)
            node.target, node.args = aten.hardtanh.default, (layer, 0.0, 1.0)
            count += 1
    finish(graph)
    return count


def _fold(graph: GraphModule, layer: Node) -> None:
    weight = constant(graph, layer.args[1])
    bias = constant(graph, layer.args[2]) if len(layer.args) > 2 else None
    assert weight is not None
    shift = torch.full((len(weight),), 0.5) if bias is None else bias / 6 + 0.5
    name = str(layer.args[1])
    new_weight = add_parameter(graph, f"{name}_sixth", weight / 6, layer)
    new_bias = add_parameter(graph, f"{name}_sixth_bias", shift, layer)
    layer.args = (layer.args[0], new_weight, new_bias, *layer.args[3:])
