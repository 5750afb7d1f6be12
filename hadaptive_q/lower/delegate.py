"""An XNNPACK delegate as a graph that can be edited: the nodes and values that its flatbuffer is made of.

Nodes name their inputs and outputs by the id of a value; a value has type, shape and scale, and a constant its bytes.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from executorch.backends.xnnpack import xnnpack_preprocess
from executorch.backends.xnnpack.serialization.xnnpack_graph_schema import ConstantDataOffset
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import serialize_xnnpack_binary

INVALID = 2**32 - 1
_ALIGNMENT = 16
# By what reads them: operators that copy a constant into a form of their own when the file is loaded.
_PACKING = ("XNNConv2d", "XNNDepthwiseConv2d", "XNNConvTranspose2d", "XNNFullyConnected")
_PACKED_FIELDS = ("filter_id", "bias_id")


@dataclass(frozen=True)
class Node:
    """One operator: `kind` is its name in the schema, such as ``XNNStaticTranspose``."""

    raw: Any

    @property
    def kind(self) -> str:
        return type(self.raw.xnode_union).__name__

    @property
    def fields(self) -> Any:
        """The node's own table of the schema."""
        return self.raw.xnode_union

    @property
    def debug_handle(self) -> int:
        """The number that lowering gave to the operator of the program it came from."""
        return int(self.raw.debug_handle)

    @property
    def inputs(self) -> list[int]:
        return [i for name, i in self._ids() if not name.startswith("output")]

    @property
    def outputs(self) -> list[int]:
        return [i for name, i in self._ids() if name.startswith("output")]

    @property
    def output(self) -> int:
        (only,) = self.outputs
        return only

    @property
    def settings(self) -> dict[str, Any]:
        """Everything but the ids: what the operator does, whatever to."""
        return {f.name: getattr(self.fields, f.name) for f in dataclasses.fields(self.fields) if f.name[-3:] != "_id"}

    def replace_input(self, old: int, new: int) -> None:
        for name, value in self._ids():
            if value == old and not name.startswith("output"):
                setattr(self.fields, name, new)

    def _ids(self) -> Iterator[tuple[str, int]]:
        for field in dataclasses.fields(self.fields):
            if field.name.endswith("_id"):
                value = getattr(self.fields, field.name)
                # Unused places of a concatenation hold 0 or the invalid id; how many are used stands in its name.
                if value != INVALID and not _unused_place(type(self.fields).__name__, field.name):
                    yield field.name, value


def _unused_place(kind: str, name: str) -> bool:
    if not kind.startswith("XNNConcatenate") or not name.startswith("input"):
        return False
    return int(name.removeprefix("input").removesuffix("_id")) > int(kind.removeprefix("XNNConcatenate"))


@dataclass(frozen=True)
class Value:
    """One tensor: `dims` in the order of memory, `quantization` its scale and zero point where it has them."""

    raw: Any

    @property
    def tensor(self) -> Any:
        union = self.raw.xvalue_union
        return getattr(union, "tensor_value", union)

    @property
    def quantization(self) -> Any:
        return getattr(self.raw.xvalue_union, "quant_params", None)

    @property
    def datatype(self) -> str:
        """``fp32``, ``qint8``, ``qcint8`` and so on."""
        name = self.tensor.datatype
        return str(getattr(name, "name", name)).removeprefix("xnn_datatype_")

    @property
    def dims(self) -> list[int]:
        return list(self.tensor.dims)

    @property
    def is_external(self) -> bool:
        return bool(self.tensor.flags)

    @property
    def is_quantized(self) -> bool:
        return self.quantization is not None

    def like(self, other: Value) -> bool:
        """Whether both hold the same numbers for the same bytes: type, shape and scale."""
        return (self.datatype, self.dims, self.quantization) == (other.datatype, other.dims, other.quantization)


class Delegate:
    """The nodes in order of execution and the values by id, edited in place; `named` holds the constants by name."""

    def __init__(self, graph: Any, named: Mapping[str, bytes]) -> None:
        self.graph = graph
        # By index of the graph's table of constants, in which 0 means none.
        self.constants = {index: named[entry.named_key] for index, entry in enumerate(graph.constant_data) if index}

    @property
    def nodes(self) -> list[Node]:
        return [Node(raw) for raw in self.graph.xnodes]

    @property
    def values(self) -> dict[int, Value]:
        return {value.tensor.id_out: value for value in map(Value, self.graph.xvalues)}

    def remove(self, nodes: list[Node]) -> None:
        """Take `nodes` out, and every value that nothing reads or makes any longer."""
        gone = {id(node.raw) for node in nodes}
        self.graph.xnodes = [raw for raw in self.graph.xnodes if id(raw) not in gone]
        used = {i for node in self.nodes for i in (*node.inputs, *node.outputs)}
        self.graph.xvalues = [v.raw for v in self.values.values() if v.tensor.id_out in used or v.is_external]

    def replace_value(self, old: int, new: int) -> None:
        """Let every reader of value `old` read `new`."""
        for node in self.nodes:
            node.replace_input(old, new)

    def swap(self, first: Node, second: Node) -> None:
        """Let the element-wise `second` come before `first`, whose result it alone reads."""
        values, (source,), between, last = self.values, first.inputs, first.output, second.output
        swapped = copy.deepcopy(values[last].raw)
        Value(swapped).tensor.dims = values[source].dims
        Value(swapped).tensor.id_out = between
        self.graph.xvalues = [swapped if v.tensor.id_out == between else v.raw for v in values.values()]
        first.replace_input(source, between)
        second.replace_input(between, source)
        first.fields.output_id, second.fields.output_id = last, between
        order = self.graph.xnodes
        earlier, later = (next(i for i, raw in enumerate(order) if raw is node.raw) for node in (first, second))
        order[earlier], order[later] = order[later], order[earlier]

    def packed_constants(self) -> set[int]:
        """Return the indices of the constants that are copied when the file is loaded, and not read afterwards."""
        values, packed, kept = self.values, set[int](), set[int]()
        for node in self.nodes:
            weights = [getattr(node.fields, name) for name in _PACKED_FIELDS] if node.kind in _PACKING else []
            for i in node.inputs:
                (packed if i in weights else kept).update(constants_of(values[i]))
        return packed - kept


def constants_of(value: Value) -> set[int]:
    """Return the indices of the constants that hold the numbers and the scales of `value`."""
    found = {int(value.tensor.constant_buffer_idx), int(getattr(value.quantization, "scale_buffer_idx", 0) or 0)}
    return {index for index in found if 0 < index < INVALID}


@contextmanager
def kept_graphs() -> Iterator[dict[bytes, Any]]:
    """Yield a dictionary that holds, for every delegate compiled meanwhile, its graph by its bytes.

    The compiler has no place for edits between making a graph and serializing it, and its flatbuffers cannot be read
    back: the one reader that comes with it prints floats with six decimals, and scales would lose their last bits.
    """
    kept: dict[bytes, Any] = {}
    serialize = xnnpack_preprocess.serialize_xnnpack_binary

    def keep(graph: Any, constants: bytearray) -> bytes:
        payload: bytes = serialize(graph, constants)
        kept[payload] = graph
        return payload

    xnnpack_preprocess.serialize_xnnpack_binary = keep
    try:
        yield kept
    finally:
        xnnpack_preprocess.serialize_xnnpack_binary = serialize


def write_delegate(delegate: Delegate) -> tuple[bytes, dict[str, bytes]]:
    """Return the delegate's bytes and the constants to be kept beside them, by name.

    Constants that the runtime copies when it loads the file lie in the delegate itself: a name for each, and an entry
    in the program's table, would cost 160 bytes more. Those that operators go on reading must stay outside: the runtime
    frees the delegate's bytes once it is loaded.
    """
    graph = copy.deepcopy(delegate.graph)
    values = [Value(raw) for raw in graph.xvalues]
    region, named, places = bytearray(), dict[str, bytes](), dict[int, int]()
    inside, table = delegate.packed_constants(), [ConstantDataOffset(0, 0)]
    for index in sorted(set().union(*map(constants_of, values))):
        data, entry = delegate.constants[index], graph.constant_data[index]
        if index in inside:
            region += bytes(-len(region) % _ALIGNMENT)
            # No name at all: an empty one would be looked up.
            entry = ConstantDataOffset(offset=len(region), size=len(data), named_key=None)
            region += data
        else:
            named[entry.named_key] = data
        places[index] = len(table)
        table.append(entry)
    for value in values:
        _move_constants(value, places)
    graph.constant_data = table
    return serialize_xnnpack_binary(graph, region), named


def _move_constants(value: Value, places: Mapping[int, int]) -> None:
    tensor, quantization = value.tensor, value.quantization
    tensor.constant_buffer_idx = places.get(tensor.constant_buffer_idx, 0)
    if getattr(quantization, "scale_buffer_idx", 0) in places:
        quantization.scale_buffer_idx = places[quantization.scale_buffer_idx]
