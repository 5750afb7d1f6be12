"""Cross-Hadamard products by rolled slices instead of indexed pairs.

The pairs ``(i, i + d mod Cs)`` for ``d = 1 .. Cs / 2`` are all pairs, each once (the last distance of an even `Cs`
counts half). With ``ZZ = concat(Z, Z[: Cs / 2])``, distance `d` is one product of whole tensors,
``Z * ZZ[d : d + Cs]``. Slots come out in another order, so the weights of the norm, of the depthwise convolution and
the projection's columns are reordered with them. XNNPACK has slices and products, but no index.

Other forms would be float-equal, too; a block takes the one that was measured to cost least (`pair_costs`), and a form
that never does is not written here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from hadaptive_q.models.cross_hadamard import pair_indices
from hadaptive_q.rewrite.graph import aten, calls, constant, finish
from hadaptive_q.rewrite.pair_costs import cheapest_form
from hadaptive_q.rewrite.permute_channels import permute_readers


def roll_pairs(graph: GraphModule) -> int:
    """Replace every indexed product in place and return how many there were."""
    count = 0
    for product in calls(graph, aten.mul.Tensor):
        z = _indexed_source(graph, product)
        if z is None:
            continue
        cs, height, width = (int(size) for size in z.meta["val"].shape[1:])
        order, build = FORMS[cheapest_form(cs, height, width)]
        if cs > 2:  # a single product has one order, and what reads it may be no depthwise convolution any more
            permute_readers(graph, product, order(cs))
        product.replace_all_uses_with(build(graph, product, z, cs))
        count += 1
    finish(graph)
    return count


def rolled_pairs(cs: int) -> list[tuple[int, int]]:
    """Return the pairs in rolled order: by distance, then by the first channel."""
    return [(i, (i + d) % cs) for d in range(1, cs // 2 + 1) for i in range(cs if 2 * d < cs else cs // 2)]


def slot_order(cs: int) -> Tensor:
    """Return, for every slot in rolled order, its place in row-major order `(E,)`."""
    i, j = pair_indices(cs)
    place = {(int(a), int(b)): slot for slot, (a, b) in enumerate(zip(i, j, strict=True))}
    return torch.tensor([place[min(pair), max(pair)] for pair in rolled_pairs(cs)])


def _indexed_source(graph: GraphModule, product: Node) -> Node | None:
    """Return `Z` where `product` is ``Z[:, i] * Z[:, j]`` over all row-major pairs of its channels."""
    operands = [a for a in product.args if isinstance(a, Node) and a.target == aten.index.Tensor]
    if len(operands) != 2 or operands[0].args[0] is not operands[1].args[0]:
        return None
    z = operands[0].args[0]
    assert isinstance(z, Node)
    wanted = pair_indices(int(z.meta["val"].shape[1]))
    for operand, indices in zip(operands, wanted, strict=True):
        found = constant(graph, operand.args[1][1])  # type: ignore[index]
        if found is None or not torch.equal(found.cpu(), indices):
            return None
    return z


def _rolled(graph: GraphModule, product: Node, z: Node, cs: int) -> Node:
    def call(target: Any, channels: int, *args: Any) -> Node:
        with graph.graph.inserting_before(product):
            node = graph.graph.call_function(target, args)
        node.meta = dict(product.meta)
        like = z.meta["val"]
        node.meta["val"] = like.new_empty((like.shape[0], channels, *like.shape[2:]))
        return node

    half = call(aten.slice.Tensor, cs // 2, z, 1, 0, cs // 2)
    doubled = call(aten.cat.default, cs + cs // 2, [z, half], 1)
    parts = []
    for distance in range(1, cs // 2 + 1):
        count = cs if 2 * distance < cs else cs // 2
        left = z if count == cs else half
        right = call(aten.slice.Tensor, count, doubled, 1, distance, distance + count)
        parts.append(call(aten.mul.Tensor, count, left, right))
    return call(aten.cat.default, cs * (cs - 1) // 2, parts, 1) if len(parts) > 1 else parts[0]


# By its name in the table: the order of the slots and the form itself.
FORMS: dict[str, tuple[Callable[[int], Tensor], Callable[[GraphModule, Node, Node, int], Node]]] = {
    "rolled": (slot_order, _rolled),
}
