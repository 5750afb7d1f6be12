"""Per-sample selection without `topk` and `gather`: rank by counting, choose by a one-hot matrix product.

Formula, for scores `xi (C)`: ``before[c, c'] = clamp(2^60 xi_c' - 2^60 xi_c + [c' < c], 0, 1)`` is 1 where channel c'
ranks before channel c (ties to the lower index), ``rank_c = sum_c' before[c, c']``,
``P[c, r] = clamp(1 - |rank_c - r|, 0, 1)`` and ``Z = X~ P``. In channel order, `r` counts chosen channels of lower
index instead. Exact for scores below 2^67 that differ by 2^-60 or more where they do: a factor of a power of two rounds
nothing, so a difference is 0 or at least 1; sums of ones are exact; a one-hot product copies values. XNNPACK runs every
operator of it, so the selection stays inside the delegate; `topk` and `gather` would end it. X~ is read with its
channels last, which is how a convolution leaves it in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from hadaptive_q.rewrite.graph import add_buffer, aten, calls, finish
from hadaptive_q.rewrite.products import walk_to_selection

BIG = 2.0**60


def select_by_rank(graph: GraphModule) -> int:
    """Replace every per-sample selection in place and return how many there were."""
    count = 0
    shared: dict[str, Node] = {}
    for gather in calls(graph, aten.gather.default):
        found = walk_to_selection(gather)
        if found is None:
            continue
        chosen = _Builder(graph, gather, shared).selection(found.mixed, found.scores, found.cs, found.channel_order)
        gather.replace_all_uses_with(chosen)
        count += 1
    finish(graph)
    return count


class _Builder:
    """Insert calls before one node; what does not depend on the image is `shared` with those that come after."""

    def __init__(self, graph: GraphModule, before: Node, shared: dict[str, Node]) -> None:
        self.graph, self.before, self.shared = graph, before, shared

    def call(self, target: Any, *args: Any) -> Node:
        with self.graph.graph.inserting_before(self.before):
            node = self.graph.graph.call_function(target, args)
        node.meta = dict(self.before.meta)
        return node

    def buffer(self, name: str, value: Tensor) -> Node:
        """Return the constant `value`; a `name` stands for one value."""
        if name not in self.shared:
            self.shared[name] = add_buffer(self.graph, f"selection_{name}", value, self.before)
        return self.shared[name]

    def lower(self, channels: int) -> Node:
        """Return ``[c' < c]``, `(1, C, C)`: from two small vectors, as a constant it would be a tenth of a file."""
        name = f"lower_{channels}"
        if name not in self.shared:
            index = torch.arange(channels, dtype=torch.float32)
            row, column = self.buffer(f"row_{channels}", index[None, :, None]), index[None, None]
            difference = self.call(aten.sub.Tensor, row, self.buffer(f"column_{channels}", column))
            self.shared[name] = self._unit(difference)
        return self.shared[name]

    def selection(self, mixed: Node, scores: Node, cs: int, channel_order: bool) -> Node:
        """Return `(B, cs, H, W)`, the channels of `mixed` `(B, C, H, W)` with the largest `scores` `(B, C)`."""
        _, channels, height, width = mixed.meta["val"].shape
        # An exact tie would pass a gradient of 2^60 in QAT; the choice has none.
        scores = self.call(aten.detach.default, scores)
        lower = self.lower(channels)
        scaled = self.call(aten.mul.Tensor, scores, BIG)
        across = self.call(aten.view.default, scaled, [-1, 1, channels])
        down = self.call(aten.view.default, scaled, [-1, channels, 1])
        before = self._unit(self.call(aten.add.Tensor, self.call(aten.sub.Tensor, across, down), lower))
        ones = self.buffer(f"ones_{channels}", torch.ones(1, channels))
        rank = self.call(aten.linear.default, before, ones)  # (B, C, 1)
        if channel_order:
            is_chosen = self._unit(self._minus(cs, rank))
            earlier = self.call(aten.view.default, is_chosen, [-1, 1, channels])
            position = self.call(aten.linear.default, self.call(aten.mul.Tensor, earlier, lower), ones)
        else:
            is_chosen, position = None, rank
        slots = self.buffer(f"slots_{cs}", torch.arange(cs, dtype=torch.float32)[None, None])
        distance = self.call(aten.abs.default, self.call(aten.sub.Tensor, position, slots))
        one_hot = self._unit(self._minus(1, distance))  # (B, C, cs)
        if is_chosen is not None:
            one_hot = self.call(aten.mul.Tensor, one_hot, is_chosen)
        last = self.call(aten.permute.default, mixed, [0, 2, 3, 1])
        pixels = self.call(aten.view.default, last, [-1, int(height) * int(width), channels])
        z = self.call(aten.bmm.default, pixels, one_hot)
        z = self.call(aten.view.default, z, [-1, int(height), int(width), cs])
        out = self.call(aten.permute.default, z, [0, 3, 1, 2])
        out.meta["val"] = self.before.meta["val"]
        return out

    def _minus(self, minuend: int, subtrahend: Node) -> Node:
        """``minuend - subtrahend`` as one operator that XNNPACK takes: it has no `rsub`."""
        return self.call(
            aten.sub.Tensor, self.buffer(f"number_{minuend}", torch.full((1, 1, 1), float(minuend))), subtrahend
        )

    def _unit(self, node: Node) -> Node:
        return self.call(aten.clamp.default, node, 0.0, 1.0)
