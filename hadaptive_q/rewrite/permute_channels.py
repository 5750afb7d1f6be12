"""Reorder the channels of a tensor and of everything that reads it, without moving data.

Weights, norms and projection columns are reordered once, ahead of time; the result of the graph stays the same.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from hadaptive_q.rewrite.graph import aten, constant

_ELEMENTWISE = {
    *(aten.hardswish.default, aten.hardswish_.default, aten.abs.default, aten.neg.default, aten.clamp.default),
    *(aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor),
}


def permute_readers(graph: GraphModule, source: Node, order: Tensor, but: Iterable[Node] = ()) -> None:
    """Make every reader of `source`, but those given, expect channel ``order[k]`` at place `k`.

    The caller makes `source` deliver them so. Raises ValueError, with nothing changed, where a reader cannot
    be followed: only element-wise operators, concatenations over channels and convolutions can.
    """
    edits: list[tuple[Node, int, Tensor]] = []
    _follow(graph, source, order, edits, set(but))
    for node, axis, along in edits:
        value = constant(graph, node)
        assert value is not None
        with torch.no_grad():
            replace_constant(graph, node, value.index_select(axis, along))


def replace_constant(graph: GraphModule, node: Node, value: Tensor) -> None:
    """Give the parameter or buffer that `node` reads another value."""
    old = constant(graph, node)
    owner, _, leaf = str(node.target).rpartition(".")
    new = nn.Parameter(value.detach().clone()) if isinstance(old, nn.Parameter) else value.detach().clone()
    setattr(graph.get_submodule(owner), leaf, new)


def _follow(
    graph: GraphModule, source: Node, order: Tensor, edits: list[tuple[Node, int, Tensor]], seen: set[Node]
) -> None:
    for user in source.users:
        if user in seen:
            continue
        seen.add(user)
        if user.target in _ELEMENTWISE:
            for argument in user.all_input_nodes:
                value = constant(graph, argument)
                # One value for all channels broadcasts whatever their order.
                if value is not None and value.dim() == 4 and value.shape[1] > 1:
                    edits.append((argument, 1, order))
            _follow(graph, user, order, edits, seen)
        elif user.target == aten.cat.default and user.args[1] == 1:
            _follow(graph, user, _extended(user, source, order), edits, seen)
        elif user.target == aten.conv2d.default:
            _through_convolution(graph, user, order, edits, seen)
        else:
            raise ValueError(f"{user.name} ({user.target}) reads channels in an order that cannot be changed")


def _through_convolution(
    graph: GraphModule, conv: Node, order: Tensor, edits: list[tuple[Node, int, Tensor]], seen: set[Node]
) -> None:
    weight, bias = conv.args[1], conv.args[2] if len(conv.args) > 2 else None
    groups = conv.args[6] if len(conv.args) > 6 else 1
    assert isinstance(weight, Node)
    if groups == 1:
        edits.append((weight, 1, order))
    elif groups == len(order):
        edits.append((weight, 0, order))
        if isinstance(bias, Node):
            edits.append((bias, 0, order))
        _follow(graph, conv, order, edits, seen)
    else:
        raise ValueError(f"{conv.name} has groups of more than one channel")


def _extended(cat: Node, source: Node, order: Tensor) -> Tensor:
    """Return the order of a whole concatenation whose part `source` is reordered."""
    parts, start = [], 0
    sources = cat.args[0]
    assert isinstance(sources, list | tuple)
    for part in sources:
        assert isinstance(part, Node)
        count = int(part.meta["val"].shape[1])
        parts.append(order + start if part is source else torch.arange(start, start + count))
        start += count
    return torch.cat(parts)
