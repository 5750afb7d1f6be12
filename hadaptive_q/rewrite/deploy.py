"""The deploy form: the float network's graph after the float-equal rewrites that every target profits from."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.fx import GraphModule

from hadaptive_q.rewrite.equalise_products import equalise_products
from hadaptive_q.rewrite.fold_batch_norm import fold_batch_norm
from hadaptive_q.rewrite.fold_dysoft import fold_dysoft
from hadaptive_q.rewrite.fold_hardsigmoid import fold_hardsigmoid
from hadaptive_q.rewrite.graph import trace
from hadaptive_q.rewrite.merge_convolutions import merge_convolutions
from hadaptive_q.rewrite.merge_linears import merge_linears
from hadaptive_q.rewrite.patchify import patchify
from hadaptive_q.rewrite.roll_pairs import roll_pairs
from hadaptive_q.rewrite.select_by_rank import select_by_rank
from hadaptive_q.rewrite.sink_batch_norm import sink_batch_norm
from hadaptive_q.rewrite.sink_concat import sink_concat
from hadaptive_q.rewrite.slice_selection import slice_selection
from hadaptive_q.rewrite.split_convolution import split_convolution
from hadaptive_q.rewrite.split_depthwise import split_depthwise

# In this order: concatenations sink once the convolutions carry their BatchNorm; gains move, convolutions merge and
# channels are reordered once every depthwise convolution has its own part of them.
REWRITES: tuple[Callable[[GraphModule], int], ...] = (
    sink_batch_norm,
    fold_batch_norm,
    fold_hardsigmoid,
    merge_linears,
    split_convolution,
    sink_concat,
    merge_convolutions,
    patchify,
    select_by_rank,
    slice_selection,
    fold_dysoft,
    equalise_products,
    roll_pairs,
    split_depthwise,
)


def deploy_graph(model: nn.Module, image_size: int) -> GraphModule:
    """Return `model` in deploy form, for inputs `(B, 3, S, S)`; equal to `model` in eval mode to float rounding."""
    graph = trace(model, image_size)
    for rewrite in REWRITES:
        rewrite(graph)
    return graph
