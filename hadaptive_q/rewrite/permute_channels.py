"""Reorder the channels of a tensor and of everything that reads it, without moving data.

Weights, norms and projection columns are reordered once, ahead of time; the result of the graph stays the same.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from hadaptive_q.rewrite.graph import ACTIVATIONS, aten, constant

_ELEMENTWISE = {
    *(*ACTIVATIONS, aten.abs.default, aten.neg.default, aten.clamp.default),
    *(aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor),
}


def permute_readers(graph: GraphModule, source: Node, order: Tensor, but: Iterable[Node] = ()) -> None:
    """Make every reader of `source`, but those given, expect channel ``order[k]`` at place `k`.

    The caller makes `source` deliver them so. Raises ValueError, with nothing changed, where a reader cannot
    be followed: only element-wise operators, concatenations over channels and convolutions can.
    """
    orders, edits, left_out = {source: order}, _Edits(), set(but)
    for node in graph.graph.nodes:  # in topological order: what a node reads has its order by now
        if node in left_out or not any(argument in orders for argument in node.all_input_nodes):
            continue
        through = _through(graph, node, orders, edits)
        if through is not None:
            orders[node] = through
    for (node, axis), along in edits.items():
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


class _Edits(dict[tuple[Node, int], Tensor]):
    """What becomes of each constant: its reader in the graph and the axis, to the new order along it."""

    def add(self, node: Node, axis: int, order: Tensor) -> None:
        if not torch.equal(self.setdefault((node, axis), order), order):
            raise ValueError(f"{node.name} is read in two orders of channels")


def _through(graph: GraphModule, node: Node, orders: dict[Node, Tensor], edits: _Edits) -> Tensor | None:
    """Return the order of `node`'s own channels, or None where it mixes them."""
    if node.target in _ELEMENTWISE:
        activations = [a for a in node.all_input_nodes if constant(graph, a) is None]
        order = next(orders[a] for a in activations if a in orders)
        if any(a not in orders or not torch.equal(orders[a], order) for a in activations):
            raise ValueError(f"{node.name} meets tensors with channels in two orders")
        for argument in node.all_input_nodes:
            value = constant(graph, argument)
            # One value for all channels broadcasts whatever their order.
            if value is not None and value.dim() == 4 and value.shape[1] > 1:
                edits.add(argument, 1, order)
        return order
    if node.target == aten.cat.default and node.args[1] == 1:
        return _joined(node, orders)
    source = node.args[0] if node.args else None
    if node.target == aten.conv2d.default and isinstance(source, Node) and source in orders:
        return _through_convolution(graph, node, orders[source], edits)
    raise ValueError(f"{node.name} ({node.target}) reads channels in an order that cannot be changed")


def _through_convolution(graph: GraphModule, conv: Node, order: Tensor, edits: _Edits) -> Tensor | None:
    weight, bias = conv.args[1], conv.args[2] if len(conv.args) > 2 else None
    groups = conv.args[6] if len(conv.args) > 6 else 1
    assert isinstance(weight, Node)
    if groups == 1:
        edits.add(weight, 1, order)
        return None
    if groups != len(order) or conv.meta["val"].shape[1] != groups:
        raise ValueError(f"{conv.name} has groups of more than one channel")
    edits.add(weight, 0, order)
    if isinstance(bias, Node):
        edits.add(bias, 0, order)
    return order


def _joined(cat: Node, orders: dict[Node, Tensor]) -> Tensor:
    """Return the order of a whole concatenation, of whose parts some are reordered."""
    parts, start = [], 0
    sources = cat.args[0]
    assert isinstance(sources, list | tuple)
    for part in sources:
        assert isinstance(part, Node)
        count = int(part.meta["val"].shape[1])
        parts.append(orders.get(part, torch.arange(count)) + start)
        start += count
    return torch.cat(parts)
