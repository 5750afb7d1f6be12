"""Edit an exported ONNX model so that it is small and onnxruntime loads it; no number of an answer changes."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from onnx import TensorProto, helper, numpy_helper

# Operators that onnxruntime takes for the same on codes as on numbers.
MOVING = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Slice")


def drop_remarks(model: Any) -> None:
    """Remove what the exporter notes down about its work: four fifths of a small file, source paths among it."""
    graph = model.graph
    # Shapes between the operators follow from the operators.
    del graph.value_info[:]
    for part in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        del part.metadata_props[:]
        part.ClearField("doc_string")


def move_codes(model: Any) -> None:
    """Transpose, reshape and slice codes instead of the numbers they stand for (in place).

    onnxruntime (1.31) would quantize such a node's result, too, by a QuantizeLinear with the attribute `output_dtype`
    that opset 21 has, and then, on x86, turn int8 into uint8 everywhere but in there. Such a file does not load:
    "output_dtype INT8 does not match y_zero_point type UINT8".
    """
    graph = model.graph
    made = {name: node for node in graph.node for name in node.output}
    nodes = []
    for node in graph.node:
        source, result = made.get(node.input[0], node), node.output[0]
        readers = {reader.op_type for reader in graph.node if result in reader.input}
        nodes.append(node)
        # What is quantized again at once needs no help.
        if node.op_type not in MOVING or readers == {"QuantizeLinear"} or source.op_type != "DequantizeLinear":
            continue
        codes = f"{result}_codes"
        node.input[0], node.output[0] = source.input[0], codes
        made[result] = helper.make_node("DequantizeLinear", [codes, *source.input[1:]], [result], f"{result}_values")
        nodes.append(made[result])
    used = {name for node in nodes for name in node.input} | {value.name for value in graph.output}
    del graph.node[:]
    graph.node.extend(node for node in nodes if node.output[0] in used)


def store_four_bits(model: Any, weights: Set[bytes]) -> None:
    """Store the int8 initializers whose codes are among `weights` as INT4, two codes in a byte (in place)."""
    graph = model.graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    four = helper.tensor_dtype_to_np_dtype(TensorProto.INT4)
    packed = {}
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in stored:
            continue
        codes, zero_points = stored[node.input[0]], stored[node.input[2]]
        if codes.tobytes() in weights:
            # The type of the zero points is that of the codes.
            zeros = f"zero_points_int4_{zero_points.size}"
            packed[node.input[0]] = numpy_helper.from_array(codes.astype(four), node.input[0])
            packed[zeros] = numpy_helper.from_array(zero_points.astype(four), zeros)
            node.input[2] = zeros
    used = {name for node in graph.node for name in node.input}
    kept = [t for t in graph.initializer if t.name in used and t.name not in packed]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *packed.values()])
