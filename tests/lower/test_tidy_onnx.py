"""Edits of an ONNX model leave its answers as they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from hadaptive_q.lower.tidy_onnx import move_codes, store_four_bits

CODES = np.random.default_rng(0).integers(-7, 8, (6, 8), dtype=np.int8)


def model() -> Any:
    """Codes that are transposed, reshaped and read as they are; and a layer of small codes."""
    constants = {
        "scale": np.float32(0.1),
        "zero": np.int8(3),
        "shape": np.array([6, 8]),
        "codes": CODES,
        "scales": np.linspace(0.1, 0.6, 6, dtype=np.float32),
        "zeros": np.zeros(6, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        helper.make_node("Transpose", ["d"], ["t"]),
        helper.make_node("Reshape", ["t", "shape"], ["r"]),
        helper.make_node("DequantizeLinear", ["codes", "scales", "zeros"], ["w"], axis=0),
        helper.make_node("Mul", ["r", "w"], ["m"]),
        helper.make_node("Sub", ["m", "d"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [6, 8]) for name in ("x", "y")]
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "small", values[:1], values[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def answer(model: Any) -> Any:
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.random.default_rng(1).normal(size=(6, 8)).astype(np.float32)})[0]


def before(model: Any) -> Any:
    """Return the answer without any optimisation."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.random.default_rng(1).normal(size=(6, 8)).astype(np.float32)})[0]


def test_codes_move_as_far_as_they_go() -> None:
    wanted, moved = before(model()), model()
    move_codes(moved)
    made = {name: node for node in moved.graph.node for name in node.output}
    assert made["r"].op_type == "DequantizeLinear"
    assert [made[made["r"].input[0]].op_type, made[made[made["r"].input[0]].input[0]].op_type] == [
        "Reshape",
        "Transpose",
    ]
    assert made["d"].op_type == "DequantizeLinear", "another reads it where it was"
    assert "t" not in made, "nobody reads it"
    assert np.array_equal(answer(moved), wanted)


@pytest.mark.parametrize("weights", [{CODES.tobytes()}, set()], ids=["four", "none"])
def test_small_codes_take_half_a_byte(weights: set[bytes]) -> None:
    packed = model()
    store_four_bits(packed, weights)
    (codes,) = (tensor for tensor in packed.graph.initializer if tensor.name == "codes")
    assert len(codes.raw_data) == (CODES.size // 2 if weights else CODES.size)
    assert {tensor.name for tensor in packed.graph.initializer} >= {"scale", "zero", "shape", "scales"}
    assert ("zeros" in {tensor.name for tensor in packed.graph.initializer}) == (not weights)
    assert np.array_equal(before(packed), before(model()))
    onnx.checker.check_model(packed, full_check=True)
