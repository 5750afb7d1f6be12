"""Merge linears of one input whose results are added, and take constant factors into a linear.

Formula: ``c (W x + b) = (c W) x + c b``; ``(W1 x + b1) + (W2 x + b2) = (W1 + W2) x + (b1 + b2)``.
Two heads whose logits are averaged become one.
"""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule, Node

from hadaptive_q.rewrite.graph import add_parameter, aten, calls, constant, finish

Layer = tuple[Tensor, Tensor | None]


def merge_linears(graph: GraphModule) -> int:
    """Merge in place and return how many additions and factors went away."""
    count = 0
    for node in calls(graph, aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor):
        merged = _sum(graph, node) if node.target == aten.add.Tensor else _scaled(graph, node)
        if merged is not None:
            _replace(graph, node, *merged)
            count += 1
    finish(graph)
    return count


def _sum(graph: GraphModule, node: Node) -> Layer | None:
    first, second = (_layer(graph, argument) for argument in node.args[:2])
    sources = {argument.args[0] for argument in node.all_input_nodes if argument.args}
    if first is None or second is None or len(sources) != 1 or node.kwargs:
        return None
    (w1, b1), (w2, b2) = first, second
    return w1 + w2, b2 if b1 is None else b1 if b2 is None else b1 + b2


def _scaled(graph: GraphModule, node: Node) -> Layer | None:
    layer, factor = _layer(graph, node.args[0]), node.args[1]
    if layer is None or not isinstance(factor, int | float):
        return None
    weight, bias = layer
    by = 1 / factor if node.target == aten.div.Tensor else factor
    return weight * by, None if bias is None else bias * by


def _layer(graph: GraphModule, node: object) -> Layer | None:
    """Return the weight and the bias of a linear that nothing else reads."""
    if not isinstance(node, Node) or node.target != aten.linear.default or len(node.users) != 1:
        return None
    weight = constant(graph, node.args[1])
    bias = constant(graph, node.args[2]) if len(node.args) > 2 else None
    return None if weight is None else (weight.detach(), None if bias is None else bias.detach())


def _replace(graph: GraphModule, node: Node, weight: Tensor, bias: Tensor | None) -> None:
    layer = next(source for source in node.all_input_nodes if source.target == aten.linear.default)
    name = str(layer.args[1])
    new_weight = add_parameter(graph, f"{name}_merged", weight, node)
    new_bias = None if bias is None else add_parameter(graph, f"{name}_merged_bias", bias, node)
    with graph.graph.inserting_before(node):
        new = graph.graph.call_function(aten.linear.default, (layer.args[0], new_weight, new_bias))
    new.meta = dict(layer.meta) | {"val": node.meta["val"]}
    node.replace_all_uses_with(new)
