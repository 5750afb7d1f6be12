"""What became of every operator of a lowered program: delegated or portable, int8 or float."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

# Memory planning and tuple access: bookkeeping of the graph, not operators of the network.
_BOOKKEEPING = ("alloc", "getitem", "executorch_call_delegate")
_CONVERSIONS = ("quantize_per_tensor", "dequantize_per_tensor", "dequantize_per_channel", "quantize_per_channel")


@dataclass(frozen=True)
class Coverage:
    """`delegates`: how many pieces XNNPACK runs; `portable_ops`: operators outside of them, sorted, with repeats;
    `fp32_ops`: operators inside them that compute on floats."""

    delegates: int
    portable_ops: tuple[str, ...]
    fp32_ops: tuple[str, ...]


def measure_coverage(program: ExportedProgram) -> Coverage:
    """Return the coverage of a program after delegation."""
    graph = program.graph_module
    delegates = list(_delegates(graph))
    portable = sorted(name for node in _calls(graph) if (name := _operator(node)) not in _BOOKKEEPING)
    fp32 = sorted(_operator(node) for inner in delegates for node in _calls(inner) if _is_float_computation(node))
    return Coverage(len(delegates), tuple(portable), tuple(fp32))


def _delegates(graph: GraphModule) -> Iterator[GraphModule]:
    for _, module in graph.named_children():
        original: Any = getattr(module, "original_module", None)
        if original is not None:
            yield original.graph_module


def _calls(graph: GraphModule) -> Iterator[Node]:
    yield from (node for node in graph.graph.nodes if node.op == "call_function")


def _operator(node: Node) -> str:
    """Return the bare name of the operator: ``convolution`` for ``aten::convolution.default``."""
    schema = getattr(node.target, "_schema", None) or getattr(getattr(node.target, "_op", None), "_schema", None)
    name: str = schema.name if schema is not None else getattr(node.target, "__name__", str(node.target))
    return name.split("::")[-1]


def _is_float_computation(node: Node) -> bool:
    """An operator computes on codes where everything it reads was just dequantized and what it makes is quantized."""
    if _operator(node) in (*_CONVERSIONS, "getitem"):
        return False
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return False
    activations = [n for n in node.all_input_nodes if n.op == "call_function"]
    from_codes = bool(activations) and all(_operator(n) in _CONVERSIONS for n in activations)
    to_codes = all(_operator(user) in _CONVERSIONS for user in node.users)
    return not (from_codes and to_codes)
