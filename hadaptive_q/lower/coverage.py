"""What a lowered program is made of: delegates, operators by precision, copies and transposes, bytes by layer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from hadaptive_q.lower.delegate import Delegate, constants_of
from hadaptive_q.rewrite.graph import module_path

# Memory planning and tuple access: bookkeeping of the graph, not operators of the network.
_BOOKKEEPING = ("alloc", "getitem", "executorch_call_delegate")
_CONVERSION, _TRANSPOSE = "convert", "static_transpose"
_COPIES = ("copy", "static_slice", "static_constant_pad")
# A reshape of a tensor that the delegate made itself moves nothing.
_FREE = ("static_reshape",)


@dataclass(frozen=True)
class LayerBytes:
    """Bytes that a layer's constants take in the file: weights, biases, and the scales of both."""

    layer: str
    weights: int
    biases: int
    scales: int

    @property
    def total(self) -> int:
        return self.weights + self.biases + self.scales


@dataclass(frozen=True)
class Coverage:
    """`delegates`: how many pieces XNNPACK runs; `portable_ops`: operators outside of them, sorted, with repeats;
    `int8_ops` and `fp32_ops`: operators inside them by what they make; `conversions` between both or from one scale to
    another, `copies` and `transposes`: operators that compute nothing, how many; `layers`: the largest first."""

    delegates: int
    portable_ops: tuple[str, ...]
    int8_ops: tuple[str, ...]
    fp32_ops: tuple[str, ...]
    conversions: int
    copies: int
    transposes: int
    layers: tuple[LayerBytes, ...]


def measure_coverage(program: ExportedProgram, delegates: Sequence[Delegate]) -> Coverage:
    """Return the coverage of a program after delegation, with its `delegates` as they are written."""
    portable = sorted(name for node in _calls(program.graph_module) if (name := _operator(node)) not in _BOOKKEEPING)
    kinds = [(_kind(node.kind), d.values[node.outputs[0]].is_quantized) for d in delegates for node in d.nodes]
    moving = (_CONVERSION, _TRANSPOSE, *_COPIES, *_FREE)
    computing = [(kind, codes) for kind, codes in kinds if kind not in moving and not kind.startswith("concatenate")]
    layers = _layer_names(program.graph_module)
    return Coverage(
        delegates=len(delegates),
        portable_ops=tuple(portable),
        int8_ops=tuple(sorted(kind for kind, codes in computing if codes)),
        fp32_ops=tuple(sorted(kind for kind, codes in computing if not codes)),
        conversions=sum(kind == _CONVERSION for kind, _ in kinds),
        copies=sum(kind in _COPIES or kind.startswith("concatenate") for kind, _ in kinds),
        transposes=sum(kind == _TRANSPOSE for kind, _ in kinds),
        layers=tuple(sorted(_by_layer(delegates, layers), key=lambda layer: (-layer.total, layer.layer))),
    )


def _by_layer(delegates: Sequence[Delegate], names: Mapping[int, str]) -> Iterator[LayerBytes]:
    found: dict[str, list[int]] = {}
    for delegate in delegates:
        values, counted = delegate.values, set[int]()
        for node in delegate.nodes:
            sizes = found.setdefault(names.get(node.debug_handle, ""), [0, 0, 0])
            for place, name in enumerate(("filter_id", "bias_id")):
                value = values.get(getattr(node.fields, name, -1))
                for index in sorted(constants_of(value) - counted) if value else ():
                    counted.add(index)
                    # What is not the tensor itself is its scales.
                    kind = place if value is not None and index == value.tensor.constant_buffer_idx else 2
                    sizes[kind] += len(delegate.constants[index])
    return (LayerBytes(layer, *sizes) for layer, sizes in found.items() if sum(sizes))


def _layer_names(graph: GraphModule) -> dict[int, str]:
    """Return the module that every operator in the delegates came from, by the number that lowering gave it."""
    lowered = [original for module in graph.children() if (original := getattr(module, "original_module", None))]
    inner: list[GraphModule] = [original.graph_module for original in lowered]
    named = [(int(node.meta.get("debug_handle", -1)), module_path(node)) for each in inner for node in _calls(each)]
    # Operators that became one share a number; not each of them knows where it came from.
    return {number: path for number, path in named if path}


def _calls(graph: GraphModule) -> Iterator[Node]:
    yield from (node for node in graph.graph.nodes if node.op == "call_function")


def _kind(name: str) -> str:
    """Return the operator's name as the runtime writes it in C: ``depthwise_conv2d`` for ``XNNDepthwiseConv2d``."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.removeprefix("XNN")).lower()


def _operator(node: Node) -> str:
    """Return the bare name of the operator: ``convolution`` for ``aten::convolution.default``."""
    schema = getattr(node.target, "_schema", None) or getattr(getattr(node.target, "_op", None), "_schema", None)
    name: str = schema.name if schema is not None else getattr(node.target, "__name__", str(node.target))
    return name.split("::")[-1]
