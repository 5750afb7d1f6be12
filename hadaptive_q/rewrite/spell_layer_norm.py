"""Spell a LayerNorm over channels as operators that XNNPACK has; the runtime's own cuts the delegate in two.

Formula: with ``c = x - m`` and ``m`` the mean over the C channels of a pixel, ``n = c / sqrt(mean(c^2) + epsilon)``.
Both means are 1x1 convolutions with the constant weights ``1 / C``, epsilon the bias of the second: no layers, so they
stay in float. The permutations around the norm go away, and its scale and shift per channel become a BatchNorm that
has seen mean 0 and variance 1, which `sink_batch_norm` moves into the layers behind.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from hadaptive_q.rewrite.graph import add_buffer, aten, calls, constant, finish

_TO_ROWS, _TO_MAPS = [0, 2, 3, 1], [0, 3, 1, 2]


def spell_layer_norm(graph: GraphModule) -> int:
    """Spell every LayerNorm between the two permutations in place and return how many there were."""
    count = 0
    for norm in calls(graph, aten.layer_norm.default):
        rows = norm.args[0]
        assert isinstance(rows, Node)
        if not _is_permutation(rows, _TO_ROWS) or not all(_is_permutation(user, _TO_MAPS) for user in norm.users):
            continue
        maps = rows.args[0]
        assert isinstance(maps, Node)
        if list(norm.args[1]) != [maps.meta["val"].shape[1]]:  # type: ignore[arg-type]
            continue
        normed = _affine(graph, norm, _normalised(graph, norm, maps))
        for user in list(norm.users):
            user.replace_all_uses_with(normed)
        count += 1
    finish(graph)
    return count


def _is_permutation(node: Node, axes: list[int]) -> bool:
    return node.target == aten.permute.default and list(node.args[1]) == axes  # type: ignore[arg-type]


def _normalised(graph: GraphModule, norm: Node, maps: Node) -> Node:
    example, epsilon = maps.meta["val"], norm.args[4] if len(norm.args) > 4 else 1e-5
    channels = example.shape[1]
    weight = add_buffer(graph, f"{norm.name}_mean", torch.full((1, channels, 1, 1), 1 / channels), norm)
    bias = add_buffer(graph, f"{norm.name}_epsilon", torch.tensor([epsilon]), norm)

    def call(target: object, *args: object, narrow: bool = False) -> Node:
        with graph.graph.inserting_before(norm):
            node = graph.graph.call_function(target, args)  # type: ignore[arg-type]
        node.meta = {**norm.meta, "val": example[:, :1] if narrow else example}
        return node

    mean = call(aten.conv2d.default, maps, weight, narrow=True)
    centred = call(aten.sub.Tensor, maps, mean)
    variance = call(aten.conv2d.default, call(aten.mul.Tensor, centred, centred), weight, bias, narrow=True)
    return call(aten.mul.Tensor, centred, call(aten.rsqrt.default, variance, narrow=True))


def _affine(graph: GraphModule, norm: Node, normalised: Node) -> Node:
    """Return `normalised` scaled and shifted as `norm` does."""
    scale, shift = (*norm.args[2:4], None, None)[:2]
    some = constant(graph, scale) if constant(graph, shift) is None else constant(graph, shift)
    if some is None:
        return normalised
    mean = add_buffer(graph, f"{norm.name}_zero", torch.zeros_like(some), norm)
    variance = add_buffer(graph, f"{norm.name}_one", torch.ones_like(some), norm)
    with graph.graph.inserting_before(norm):
        arguments = (normalised, scale, shift, mean, variance, False, 0.0, 0.0, False)
        node = graph.graph.call_function(aten.batch_norm.default, arguments)
    node.meta = dict(normalised.meta)
    return node
