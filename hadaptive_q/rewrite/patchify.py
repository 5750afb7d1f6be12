"""Turn a convolution of few channels whose patches do not overlap into space-to-depth and a 1x1 convolution.

Formula: for kernel = stride = k without padding, ``W * x = W' x'`` with ``x'[(c, dy, dx)] = x[c, k i + dy, k j + dx]``.
XNNPACK's implicit matrix product reads one pixel at a time, and three channels fill no vector; a 1x1 convolution over
``3 k^2`` channels does. Exact up to the order of summation. In this order the k neighbours of a row stay together, and
the patches are made with their channels last, as the convolution will read them: one pass over the image does it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from hadaptive_q.rewrite.graph import add_parameter, aten, calls, constant, conv_settings, finish

MOST_CHANNELS = 4


def patchify(graph: GraphModule) -> int:
    """Rewrite every such convolution in place and return how many there were."""
    count = 0
    for conv in calls(graph, aten.conv2d.default):
        weight = constant(graph, conv.args[1])
        settings = conv_settings(conv)
        if weight is None or settings.groups != 1 or weight.shape[1] > MOST_CHANNELS or settings.dilation != [1, 1]:
            continue
        height, width = conv.args[0].meta["val"].shape[2:]  # type: ignore[union-attr]
        k = list(weight.shape[2:])
        if k == [1, 1] or settings.stride != k or settings.padding != [0, 0] or height % k[0] or width % k[1]:
            continue
        _rewrite(graph, conv, int(height) // k[0], int(width) // k[1])
        count += 1
    finish(graph)
    return count


def _rewrite(graph: GraphModule, conv: Node, rows: int, columns: int) -> None:
    weight = constant(graph, conv.args[1])
    assert weight is not None
    channels, ky, kx = weight.shape[1:]
    new_weight = add_parameter(graph, f"{conv.args[1]}_patch", weight.reshape(weight.shape[0], -1, 1, 1), conv)

    def call(target: Any, shape: tuple[int, ...], *args: Any) -> Node:
        with graph.graph.inserting_before(conv):
            node = graph.graph.call_function(target, args)
        node.meta = {k: v for k, v in conv.meta.items() if k == "nn_module_stack"}
        like: torch.Tensor = conv.meta["val"]
        node.meta["val"] = like.new_empty((like.shape[0], *shape))
        return node

    cells = (channels, rows, ky, columns, kx)
    split = call(aten.view.default, cells, conv.args[0], [-1, *cells])
    pixels = call(aten.permute.default, (rows, columns, channels, ky, kx), split, [0, 2, 4, 1, 3, 5])
    merged = (rows, columns, channels * ky * kx)
    # Not `reshape`: of a permuted tensor it is lowered as a clone and a view, and XNNPACK clones floats only.
    last = call(aten.view_copy.default, merged, pixels, [-1, *merged])
    patches = call(aten.permute.default, (merged[2], rows, columns), last, [0, 3, 1, 2])
    conv.args = (patches, new_weight, *conv.args[2:3])
