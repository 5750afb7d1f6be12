"""Convolve an image of bytes as it lies in memory: channels last, patches not taken apart.

A first convolution over patches of `k` columns was turned into space-to-depth and a 1x1 convolution. From NHWC bytes,
space-to-depth takes two transposes of single bytes, a third of the whole convolution's instructions; but `k` pixels of
a row lie side by side already. Formula: with ``x'[(dx, c), y, j] = x[c, y, k j + dx]``, which is a view of the NHWC
image, ``y = W' * x'`` with a kernel of `k` x 1, stride `k` x 1 and ``W'[o, (dx, c), dy, 0] = W[o, (c, dy, dx), 0, 0]``:
the same integers in another order, so the codes are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from hadaptive_q.rewrite.graph import add_buffer, aten, calls, constant, finish

_TO_NCHW = [0, 3, 1, 2]


def convolve_rows(graph: GraphModule) -> int:
    """Replace space-to-depth behind the bytes of an NHWC image in place and return how many convolutions changed.

    `graph` is a converted one with `take_bytes` applied; what has another form stays.
    """
    ops: Any = torch.ops.quantized_decomposed
    count = 0
    for conv in calls(graph, aten.conv2d.default):
        steps = list(_behind(conv, (ops.quantize_per_tensor.default, ops.dequantize_per_tensor.default)))
        weight = _codes(graph, conv)
        if weight is None or [step.target for step in steps] != _SPACE_TO_DEPTH or steps[-1].args[1] != _TO_NCHW:
            continue
        split: Any = steps[-2].args[1]
        _, channels, rows, ky, columns, kx = split
        _replace(graph, conv, steps[-1], weight.reshape(-1, channels, ky, kx), (rows, columns))
        count += 1
    finish(graph)
    return count


# From the convolution back to the image's codes.
_SPACE_TO_DEPTH = [
    aten.permute.default,
    aten.view_copy.default,
    aten.permute.default,
    aten.view.default,
    aten.permute.default,
]


def _behind(node: Node, skipped: tuple[Any, ...]) -> Iterator[Node]:
    """Yield the views that `node` reads through, the nearest first, without the conversions between them."""
    source = node.args[0]
    while isinstance(source, Node) and source.target in (*skipped, *_SPACE_TO_DEPTH):
        if source.target not in skipped:
            yield source
        source = source.args[0]


def _codes(graph: GraphModule, conv: Node) -> Tensor | None:
    weight = conv.args[1]
    return constant(graph, weight.args[0]) if isinstance(weight, Node) and weight.args else None


def _replace(graph: GraphModule, conv: Node, first: Node, weight: Tensor, cells: tuple[int, int]) -> None:
    (rows, columns), (_, channels, ky, kx) = cells, weight.shape
    image, dequantize = first.args[0], conv.args[1]
    assert isinstance(image, Node)
    assert isinstance(dequantize, Node)
    quantize_ops: Any = torch.ops.quantized_decomposed
    scale, zero_point, *codes = image.args[1:]

    def moved(source: Node, target: Any, *args: Any) -> Node:
        """Return `target` of `source` on its own codes."""
        with graph.graph.inserting_before(conv):
            view = graph.graph.call_function(target, (source, *args))
            stored = graph.graph.call_function(
                quantize_ops.quantize_per_tensor.default, (view, scale, zero_point, *codes)
            )
            return graph.graph.call_function(
                quantize_ops.dequantize_per_tensor.default, (stored, scale, zero_point, *codes)
            )

    lying = moved(image, aten.view.default, [-1, rows * ky, columns, kx * channels])
    pixels = moved(lying, aten.permute.default, _TO_NCHW)
    taps = weight.permute(0, 3, 1, 2).reshape(len(weight), kx * channels, ky, 1)
    filters = add_buffer(graph, f"{dequantize.args[0]}_rows", taps.contiguous(), dequantize)
    dequantize.replace_input_with(dequantize.args[0], filters)  # type: ignore[arg-type]
    conv.args = (pixels, dequantize, conv.args[2] if len(conv.args) > 2 else None, [ky, 1])
