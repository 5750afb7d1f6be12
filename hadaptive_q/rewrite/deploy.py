"""The deploy form: the float network's graph after the float-equal rewrites that every target profits from."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.fx import GraphModule

from hadaptive_q.rewrite.fold_batch_norm import fold_batch_norm
from hadaptive_q.rewrite.graph import trace
from hadaptive_q.rewrite.merge_convolutions import merge_convolutions
from hadaptive_q.rewrite.sink_concat import sink_concat

# In this order: convolutions merge and concatenations sink once the convolutions carry their BatchNorm.
REWRITES: tuple[Callable[[GraphModule], int], ...] = (fold_batch_norm, merge_convolutions, sink_concat)


def deploy_graph(model: nn.Module, image_size: int) -> GraphModule:
    """Return `model` in deploy form, for inputs `(B, 3, S, S)`; equal to `model` in eval mode to float rounding."""
    graph = trace(model, image_size)
    for rewrite in REWRITES:
        rewrite(graph)
    return graph
