"""Split a convolution whose result is cut into parts along its channels into one convolution per part.

Formula: ``(W x + b)[rows] = W[rows] x + b[rows]``. XNNPACK has no cut into several tensors: it would break the delegate
in two; and each part gets a scale of its own.
"""

from __future__ import annotations

import operator

from torch.fx import GraphModule, Node

from hadaptive_q.rewrite.graph import add_parameter, aten, calls, constant, conv_settings, finish

_CUTS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)


def split_convolution(graph: GraphModule) -> int:
    """Split every such convolution in place and return how many there were."""
    count = 0
    for cut in calls(graph, *_CUTS):
        conv = cut.args[0]
        assert isinstance(conv, Node)
        weight = constant(graph, conv.args[1]) if conv.target == aten.conv2d.default else None
        axis = cut.args[2] if len(cut.args) > 2 else 0
        alone = len(conv.users) == 1 and all(user.target is operator.getitem for user in cut.users)
        if weight is not None and axis == 1 and alone and conv_settings(conv).groups == 1:
            _split(graph, conv, cut)
            count += 1
    finish(graph)
    return count


def _split(graph: GraphModule, conv: Node, cut: Node) -> None:
    weight = constant(graph, conv.args[1])
    bias = constant(graph, conv.args[2]) if len(conv.args) > 2 else None
    assert weight is not None
    sizes = [int(part.shape[1]) for part in cut.meta["val"]]
    for part in list(cut.users):
        index = part.args[1]
        assert isinstance(index, int)
        rows = slice(sum(sizes[:index]), sum(sizes[: index + 1]))
        name = f"{conv.args[1]}_{index}"
        part_weight = add_parameter(graph, name, weight[rows], conv)
        part_bias = None if bias is None else add_parameter(graph, f"{name}_bias", bias[rows], conv)
        with graph.graph.inserting_before(conv):
            new = graph.graph.call_function(aten.conv2d.default, (conv.args[0], part_weight, part_bias, *conv.args[3:]))
        new.meta = dict(conv.meta) | {"val": cut.meta["val"][index]}
        part.replace_all_uses_with(new)
