"""Find the cross-Hadamard products in a deploy graph, by their shape and not by a module's name."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from hadaptive_q.rewrite.graph import aten, calls, module_path

_PER_CHANNEL = (aten.mul.Tensor, aten.add.Tensor, aten.abs.default, aten.div.Tensor, aten.neg.default)


@dataclass(frozen=True)
class Product:
    """The tensors of one ACH, by node name.

    `mixed` is X~ (B, C, H, W); `left` and `right` the operands, `product` Q and `normed` norm(Q), all
    (B, E, H, W); `indices` the per-sample choice (B, Cs), or None where the selection is frozen.
    """

    name: str
    mixed: str
    left: str
    right: str
    product: str
    normed: str
    indices: str | None


def find_products(graph: GraphModule) -> list[Product]:
    """Return every product of two channel selections of one tensor, in the order of the data."""
    found = []
    for node in calls(graph, aten.mul.Tensor):
        operands = [a for a in node.args if isinstance(a, Node) and a.target == aten.index.Tensor]
        if len(operands) != 2:
            continue
        chosen = operands[0].args[0]
        assert isinstance(chosen, Node)
        mixed, indices = _source(chosen)
        name = module_path(node).removesuffix(".norm")
        left, right = (operand.name for operand in operands)
        found.append(Product(name, mixed.name, left, right, node.name, _last_of_norm(node).name, indices))
    return found


def _source(chosen: Node) -> tuple[Node, str | None]:
    """Return X~ and the choice behind `chosen`, which is X~ itself where the selection is frozen."""
    if chosen.target != aten.gather.default:
        return chosen, None
    mixed, choice = chosen.args[0], chosen.args[2]
    assert isinstance(mixed, Node)
    assert isinstance(choice, Node)
    while choice.target in (aten.expand.default, aten.unsqueeze.default):
        (choice,) = choice.all_input_nodes
    return mixed, choice.name


def _last_of_norm(node: Node) -> Node:
    """Follow `node` through the element-wise operators of its norm to the tensor the next layer reads."""
    users = list(node.users)
    while users and all(user.target in _PER_CHANNEL for user in users):
        node = max(users, key=lambda user: len(user.all_input_nodes)) if len(users) > 1 else users[0]
        users = list(node.users)
    return node
