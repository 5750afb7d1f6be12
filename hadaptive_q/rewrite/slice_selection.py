"""Turn a frozen selection into a plain slice, by reordering the channels of X~ ahead of time.

The convolution that makes X~ delivers the chosen channels first, in their slots' order; everything else that reads X~
is reordered with it. XNNPACK has slices and no index.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from hadaptive_q.rewrite.graph import aten, calls, constant, finish
from hadaptive_q.rewrite.permute_channels import permute_readers, replace_constant


def slice_selection(graph: GraphModule) -> int:
    """Replace every selection of constant channels of a convolution in place and return how many there were."""
    count = 0
    for index in calls(graph, aten.index.Tensor):
        mixed, places = index.args
        chosen = constant(graph, places[1]) if isinstance(places, list | tuple) and len(places) == 2 else None
        if not isinstance(mixed, Node) or chosen is None or mixed.target != aten.conv2d.default:
            continue
        channels = int(mixed.meta["val"].shape[1])
        rest = [c for c in range(channels) if c not in set(chosen.tolist())]
        order = torch.cat((chosen.cpu(), torch.tensor(rest, dtype=chosen.dtype)))
        with graph.graph.inserting_before(index):
            piece = graph.graph.call_function(aten.slice.Tensor, (mixed, 1, 0, len(chosen)))
        piece.meta = dict(index.meta)
        index.replace_all_uses_with(piece)
        graph.graph.erase_node(index)
        _reorder(graph, mixed, order, piece)
        count += 1
    finish(graph)
    return count


def _reorder(graph: GraphModule, conv: Node, order: torch.Tensor, piece: Node) -> None:
    """Deliver `conv`'s channels in `order`; `piece` already expects the chosen ones first."""
    permute_readers(graph, conv, order, but={piece})
    for argument in conv.args[1:3]:
        value = constant(graph, argument)
        if isinstance(argument, Node) and value is not None:
            replace_constant(graph, argument, value[order])
