"""Keep activations of fewer bits than 8 within their codes in a runtime that stores bytes.

The runtime's quantizers saturate at the bounds of int8 only. What is to have 4 bits gets the int8 codes of the same
scale and a clamp of the codes behind them, exact in float; the runtime takes the clamp into the operator before it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.fx import GraphModule, Node

from hadaptive_q.quant.formats import ActivationFormat
from hadaptive_q.rewrite.graph import aten, calls, finish

INT8 = ActivationFormat(8).code_range


def narrow_bounds(quantize: Node) -> tuple[int, int] | None:
    """Return the lowest and the highest code of the operator `quantize`, None where they are those of int8."""
    arguments: tuple[Any, ...] = quantize.args
    low, high = arguments[3:5]
    return (low, high) if low > INT8[0] or high < INT8[1] else None


def clamp_codes(graph: GraphModule) -> GraphModule:
    """Return the converted `graph` with the codes of every tensor clamped where int8 holds more: a copy, or `graph`."""
    # Looked up late: the operators exist once a quantization library has registered them.
    ops: Any = torch.ops.quantized_decomposed
    quantize, dequantize = ops.quantize_per_tensor.default, ops.dequantize_per_tensor.default
    if not any(narrow_bounds(node) for node in calls(graph, quantize)):
        return graph
    graph = copy.deepcopy(graph)
    for node in calls(graph, dequantize):
        node.args = (*node.args[:3], *INT8, torch.int8)
    for node in calls(graph, quantize):
        bounds = narrow_bounds(node)
        if bounds is None:
            continue
        scale, zero_point = node.args[1:3]
        low, high = ((code - zero_point) * scale for code in bounds)  # type: ignore[operator]
        stored = (scale, zero_point, *INT8, torch.int8)
        node.args = (node.args[0], *stored)
        readers = list(node.users)
        with graph.graph.inserting_after(node):
            value = graph.graph.call_function(dequantize, (node, *stored))
        with graph.graph.inserting_after(value):
            clamped = graph.graph.call_function(aten.clamp.default, (value, low, high))
        with graph.graph.inserting_after(clamped):
            codes = graph.graph.call_function(quantize, (clamped, *stored))
        for reader in readers:
            reader.replace_input_with(node, codes)
    finish(graph)
    return graph
