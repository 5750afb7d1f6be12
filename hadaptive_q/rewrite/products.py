"""Find the cross-Hadamard products in a deploy graph, by their shape and not by a module's name."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from hadaptive_q.rewrite.graph import aten, calls, module_path

_PER_CHANNEL = (aten.mul.Tensor, aten.add.Tensor, aten.abs.default, aten.div.Tensor, aten.neg.default)
_VIEWS = (aten.expand.default, aten.unsqueeze.default, aten.view.default, aten.permute.default)


@dataclass(frozen=True)
class Selection:
    """A per-sample choice of `cs` channels of `mixed` (B, C, H, W) by `scores` (B, C)."""

    mixed: Node
    scores: Node
    cs: int
    channel_order: bool


@dataclass(frozen=True)
class Product:
    """The tensors of one ACH, by node name.

    `mixed` is X~ (B, C, H, W); `chosen` Z (B, Cs, H, W), whose pairwise products are Q; `normed` norm(Q) up to a
    gain per slot, (B, E, H, W), in whatever order of slots;
    `choice` the per-sample choice as indices (B, Cs) or one-hot columns (B, C, Cs), or None
    where the selection is frozen.
    """

    name: str
    mixed: str
    chosen: str
    normed: str
    choice: str | None


def find_products(graph: GraphModule) -> list[Product]:
    """Return every cross-Hadamard product, indexed or rolled, in the order of the data."""
    found = []
    for node in calls(graph, aten.mul.Tensor, aten.cat.default):
        z = indexed_operand(node) if node.target == aten.mul.Tensor else _rolled_operand(node)
        if z is not None:
            z = _unscaled(z)
            mixed, choice = _source(z)
            name = module_path(node).removesuffix(".norm")
            found.append(Product(name, mixed.name, z.name, _last_of_norm(node).name, choice))
    return found


def indexed_operand(mul: Node) -> Node | None:
    """Return `Z` of ``Z[:, i] * Z[:, j]``."""
    operands = [a for a in mul.args if isinstance(a, Node) and a.target == aten.index.Tensor]
    if len(operands) != 2 or operands[0].args[0] is not operands[1].args[0]:
        return None
    return _first_input(operands[0])


def norm_of_products(graph: GraphModule, product: Product) -> GraphModule:
    """Return the part of `graph` from the chosen channels to their normed products, as a graph of its own.

    It acts on every pixel alone: `(B, Cs, H, W) -> (B, E, H, W)` for any `B`, `H` and `W`. Shares its parameters.
    """
    nodes = {node.name: node for node in graph.graph.nodes}
    chosen, normed = nodes[product.chosen], nodes[product.normed]
    needed, waiting = {normed}, [normed]
    while waiting:
        sources = [n for n in waiting.pop().all_input_nodes if n is not chosen and n not in needed]
        needed.update(sources)
        waiting.extend(sources)
    part = Graph()
    copies = {chosen: part.placeholder("chosen")}
    for node in graph.graph.nodes:
        if node in needed:
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(copies[normed])
    return GraphModule(graph, part)


def _rolled_operand(cat: Node) -> Node | None:
    """Return `Z` of ``concat(Z * ZZ[1 : 1 + Cs], ...)`` with ``ZZ = concat(Z, ...)``."""
    first = cat.args[0][0]  # type: ignore[index]
    if not isinstance(first, Node) or first.target != aten.mul.Tensor:
        return None
    z, rolled = first.args
    if not isinstance(rolled, Node) or rolled.target != aten.slice.Tensor:
        return None
    doubled = _first_input(rolled)
    return z if doubled.target == aten.cat.default and doubled.args[0][0] is z else None  # type: ignore[index, return-value]


def chosen_indices(choice: Tensor) -> Tensor:
    """Return the choice as indices (B, Cs), whichever form it has."""
    return choice if choice.dim() == 2 else choice.argmax(dim=1)


def walk_to_selection(gather: Node) -> Selection | None:
    """Return what a `gather` of channels chooses by, or None if it is no selection of top scores."""
    mixed, choice = gather.args[0], gather.args[2]
    assert isinstance(mixed, Node)
    assert isinstance(choice, Node)
    choice = _behind_views(choice)
    # Channel order sorts by a topk of the negated choice.
    channel_order = choice.target == aten.neg.default
    if channel_order:
        negated = _first_input(_first_input(_first_input(choice)))
        choice = _first_input(negated)
    top = _first_input(choice) if choice.target == operator.getitem else choice
    if top.target != aten.topk.default:
        return None
    scores, cs = top.args[0], top.args[1]
    assert isinstance(scores, Node)
    assert isinstance(cs, int)
    return Selection(mixed, scores, cs, channel_order)


def _source(chosen: Node) -> tuple[Node, str | None]:
    """Return X~ and the choice behind `chosen`, which is X~ itself where the selection is frozen."""
    if chosen.target == aten.gather.default:
        mixed, choice = chosen.args[0], chosen.args[2]
        assert isinstance(mixed, Node)
        assert isinstance(choice, Node)
        return mixed, _behind_views(choice).name
    behind = _behind_views(chosen)
    if behind.target == aten.bmm.default:
        pixels, one_hot = behind.args
        assert isinstance(pixels, Node)
        assert isinstance(one_hot, Node)
        return _behind_views(pixels), one_hot.name
    if behind.target in (aten.index.Tensor, aten.slice.Tensor):
        return _first_input(behind), None
    return chosen, None


def _unscaled(z: Node) -> Node:
    """Return the choice itself behind the factor that DySoft's slope puts on it."""
    return _first_input(z) if z.target == aten.mul.Tensor else z


def _behind_views(node: Node) -> Node:
    while node.target in _VIEWS:
        node = _first_input(node)
    return node


def _first_input(node: Node) -> Node:
    first = node.args[0]
    assert isinstance(first, Node)
    return first


def _last_of_norm(node: Node) -> Node:
    """Follow `node` through the element-wise operators of its norm to the tensor the next layer reads."""
    users = list(node.users)
    while users and all(user.target in _PER_CHANNEL for user in users):
        node = max(users, key=lambda user: len(user.all_input_nodes)) if len(users) > 1 else users[0]
        users = list(node.users)
    return node
