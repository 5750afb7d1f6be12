"""Let a quantized program take bytes instead of floats, for the file that ships.

The image's codes are ``byte - 128`` (see `plan`), so nothing is computed: the bytes are read with the image's scale and
zero point 0, and what was the image's quantizer only moves them to int8.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from hadaptive_q.models.config import InputName
from hadaptive_q.quant.byte_rows import convolve_rows
from hadaptive_q.quant.image_grid import BYTES, image_readers
from hadaptive_q.rewrite.graph import aten, finish

INT8 = (-128, 127, torch.int8)
UINT8 = (0, 255, torch.uint8)


def as_bytes(image: Tensor, name: InputName) -> Tensor:
    """Return images `(B, 3, S, S)` of float pixels in [0, 1] as the bytes that a program of input `name` takes."""
    pixels = (image * BYTES).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous() if name == "uint8" else pixels.contiguous()


def take_bytes(graph: GraphModule, name: InputName) -> GraphModule:
    """Return a copy of a converted `graph` that takes uint8: `(B, S, S, 3)`, or `(B, 3, S, S)` for ``uint8_nchw``.

    Raises ValueError where the image is quantized with another grid than that of bytes.
    """
    graph = copy.deepcopy(graph)
    image = next(node for node in graph.graph.nodes if node.op == "placeholder")
    ops: Any = torch.ops.quantized_decomposed
    quantize, dequantize = ops.quantize_per_tensor.default, ops.dequantize_per_tensor.default
    (scale,) = {_scale(reader) for reader in image_readers(image, quantize)}

    def behind(node: Node, target: Any, *args: Any) -> Node:
        with graph.graph.inserting_after(node):
            return graph.graph.call_function(target, (node, *args))

    readers = list(image.users)
    codes = behind(behind(image, dequantize, scale, 0, *UINT8), quantize, scale, INT8[0], *INT8)
    if name == "uint8":
        moved = behind(behind(codes, dequantize, scale, INT8[0], *INT8), aten.permute.default, [0, 3, 1, 2])
        codes = behind(moved, quantize, scale, INT8[0], *INT8)
    for reader in readers:
        if reader.target == quantize:
            reader.replace_all_uses_with(codes)
        else:
            reader.replace_input_with(image, behind(codes, dequantize, scale, INT8[0], *INT8))
    finish(graph)
    convolve_rows(graph)
    return graph


def _scale(quantizer: Node) -> float:
    scale, zero_point = quantizer.args[1:3]
    if zero_point != INT8[0] or abs(float(scale) * BYTES - 1) > 1e-6:  # type: ignore[arg-type]
        raise ValueError(f"{quantizer} quantizes the image with scale {scale} and zero point {zero_point}")
    return float(scale)  # type: ignore[arg-type]
