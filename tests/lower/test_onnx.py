"""ONNX files answer like the program they came from, quantize with its very numbers, and others are refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from hadaptive_q.data.datasets import ImageData
from hadaptive_q.data.transforms import normalise
from hadaptive_q.errors import UserError
from hadaptive_q.lower.file_input import FileInput
from hadaptive_q.lower.onnx import OnnxFile, check_scales, onnx_scales, program_scales, to_onnx
from hadaptive_q.lower.parity import compare, output_scale
from hadaptive_q.models.config import InputName
from hadaptive_q.quant.program import QuantizedProgram

SIZE = 32


@dataclass(frozen=True)
class Written:
    """A program, the bytes of its ONNX file, and the file."""

    program: QuantizedProgram
    data: bytes
    path: Path

    @property
    def model(self) -> Any:
        return onnx.load_from_string(self.data)


@pytest.fixture(
    scope="module", params=[("channel", 8), ("static", 8), ("channel", 4)], ids=["dynamic", "static", "int4"]
)
def written(
    request: pytest.FixtureRequest,
    make_program: Callable[..., QuantizedProgram],
    tmp_path_factory: pytest.TempPathFactory,
) -> Written:
    """A calibrated nano network, per-sample selection or frozen, weights of 8 or 4 bits, as an ONNX file."""
    program = make_program(*request.param)
    data = to_onnx(program)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    path.write_bytes(data)
    return Written(program, data, path)


def test_file_answers_like_the_program(written: Written, inputs: Tensor) -> None:
    file = OnnxFile(written.path)
    assert file.input == FileInput("float32", (1, 3, SIZE, SIZE))
    wanted = torch.cat([written.program(image[None]) for image in inputs])
    found = torch.cat([file(image[None]) for image in inputs])
    assert len(wanted.unique()) > 50
    # Both round every tensor on the same grids; sums in another order may move a value over a rounding's edge, by one
    # code where it happens, and by a few at the output of what follows.
    parity = compare(wanted, found, output_scale(written.program.graph))
    assert parity.max_codes <= 3
    assert parity.changed_fraction <= 0.05
    assert parity.top1_agreement == 1


def test_batches_of_any_size(written: Written, inputs: Tensor) -> None:
    file = OnnxFile(written.path)
    alone = torch.cat([file(image[None]) for image in inputs[:5]])
    together = file(inputs[:5])
    assert together.shape == (5, 10)
    assert compare(alone, together, output_scale(written.program.graph)).max_codes <= 1


def test_only_standard_operators(written: Written) -> None:
    model = written.model
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 21)]
    assert not model.functions
    kinds = Counter(node.op_type for node in model.graph.node)
    weights = len(program_scales(written.program.graph).weights)
    # More where codes are moved: each reader of the moved ones has its own.
    assert kinds["DequantizeLinear"] >= kinds["QuantizeLinear"] + weights
    assert kinds["HardSwish"] > 0
    assert kinds["TopK"] == 0


def test_four_bits_take_four_bits(written: Written) -> None:
    stored = [tensor for tensor in written.model.graph.initializer if tensor.data_type == TensorProto.INT4]
    weights = [tensor for tensor in stored if len(tensor.dims) > 1]
    assert len(weights) == sum(form.packed for form in written.program.plan.weights.values())
    for tensor in weights:
        codes = onnx.numpy_helper.to_array(tensor).astype("int8")
        assert abs(codes).max() == 7
        assert len(tensor.raw_data) == codes.size // 2
    # The codes are those of the program: held against it when it was written, and here once more.
    program = {codes for codes, _, _ in program_scales(written.program.graph).weights}
    assert {onnx.numpy_helper.to_array(tensor).astype("int8").tobytes() for tensor in weights} <= program


@pytest.mark.parametrize("level", ["DISABLE_ALL", "ENABLE_BASIC", "ENABLE_EXTENDED", "ENABLE_ALL"])
def test_every_optimisation_loads_the_file(written: Written, level: str) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_{level}")
    session = onnxruntime.InferenceSession(written.data, options, providers=["CPUExecutionProvider"])
    assert [given.name for given in session.get_inputs()] == ["images"]


def test_every_shape_is_inferred(written: Written) -> None:
    inferred = onnx.shape_inference.infer_shapes(written.model, check_type=True, strict_mode=True, data_prop=True)
    known = {value.name for value in [*inferred.graph.value_info, *inferred.graph.output]}
    assert {name for node in inferred.graph.node for name in node.output} <= known
    (logits,) = inferred.graph.output
    batch, classes = logits.type.tensor_type.shape.dim
    assert (logits.name, batch.dim_param, classes.dim_value) == ("logits", "batch", 10)
    assert [given.name for given in inferred.graph.input] == ["images"]


def test_nothing_of_the_export_is_left_in_the_file(written: Written) -> None:
    for word in (b".py", b"torch.fx", b"pkg.", b"hadaptive_q/"):
        assert word not in written.data


def test_same_scales_as_the_program(written: Written) -> None:
    wanted, found = program_scales(written.program.graph), onnx_scales(written.model)
    assert found == wanted
    assert len(set(wanted.activations)) > 20
    assert all(len(readers) == 1 for _, readers in wanted.activations)
    assert len(wanted.weights) > 20


@pytest.mark.parametrize(
    ("kind", "argument", "part"),
    [("QuantizeLinear", 1, "activations"), ("DequantizeLinear", 2, "activations"), ("DequantizeLinear", 1, "weights")],
)
def test_another_number_anywhere_is_noticed(written: Written, kind: str, argument: int, part: str) -> None:
    model = written.model
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = part == "weights"
    nodes = [n for n in model.graph.node if n.op_type == kind and (n.input[0] in stored) == weights]
    # A constant is shared by whoever has the same: this one node gets another of its own.
    changed = onnx.numpy_helper.to_array(stored[nodes[-1].input[argument]]).copy()
    changed += changed.dtype.type(1)
    model.graph.initializer.append(onnx.numpy_helper.from_array(changed, "another"))
    nodes[-1].input[argument] = "another"
    with pytest.raises(RuntimeError, match=part):
        check_scales(written.program, model)


@pytest.mark.parametrize("cut", [0, 100, 30_000])
def test_cut_files_are_refused(written: Written, tmp_path: Path, cut: int) -> None:
    (tmp_path / "cut.onnx").write_bytes(written.data[:cut])
    with pytest.raises(UserError, match=r"cut\.onnx.*onnxruntime loads"):
        OnnxFile(tmp_path / "cut.onnx")


def test_a_name_that_is_no_text_is_refused(written: Written, tmp_path: Path) -> None:
    path = tmp_path / "name.onnx"
    path.write_bytes(written.data.replace(b"images", b"im\xffges"))
    with pytest.raises(UserError, match=r"name\.onnx.*utf-8.*onnxruntime loads"):
        OnnxFile(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        OnnxFile(tmp_path / "nothing.onnx")


def test_wrong_image_size_is_named(written: Written) -> None:
    with pytest.raises(UserError, match=r"input float32 \(1, 3, 32, 32\)"):
        OnnxFile(written.path)(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize(
    ("shape", "kind", "count"),
    [
        (["n", 3, "h", "w"], TensorProto.FLOAT, 1),
        ([1, 1, 32, 32], TensorProto.FLOAT, 1),
        ([1, 3, 32, 32], TensorProto.INT8, 1),
        ([1, 64], TensorProto.FLOAT, 1),
        ([1, 3, 32, 32], TensorProto.FLOAT, 2),
    ],
    ids=["free size", "grey", "signed bytes", "no images", "two inputs"],
)
def test_foreign_networks_are_refused(shape: list[int | str], kind: int, count: int, tmp_path: Path) -> None:
    names = [f"x{index}" for index in range(count)]
    inputs = [helper.make_tensor_value_info(name, kind, shape) for name in names]
    output = helper.make_tensor_value_info("y", kind, shape)
    last = names[-1]
    graph = helper.make_graph([helper.make_node("Identity", [last], ["y"])], "foreign", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (tmp_path / "foreign.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=r"foreign\.onnx.*x0.*expected images"):
        OnnxFile(tmp_path / "foreign.onnx")


@pytest.mark.parametrize(("name", "sizes"), [("uint8", (SIZE, SIZE, 3)), ("uint8_nchw", (3, SIZE, SIZE))])
def test_a_program_of_bytes(
    name: InputName,
    sizes: tuple[int, ...],
    make_byte_program: Callable[..., QuantizedProgram],
    few_digits: ImageData,
    tmp_path: Path,
) -> None:
    program = make_byte_program(name)
    data = to_onnx(program)
    (grid,) = onnx_scales(onnx.load_from_string(data)).images
    assert (grid.scale, grid.zero_point) == (float(torch.tensor(1 / 255)), 0)
    (tmp_path / "model.onnx").write_bytes(data)
    file = OnnxFile(tmp_path / "model.onnx")
    assert file.input == FileInput("uint8", (1, *sizes))
    images = torch.stack([few_digits.val[i][0] for i in range(32)])
    found = file(file.input.of(images, program.preprocess))
    wanted = program(normalise(images, program.preprocess))
    parity = compare(wanted, found, output_scale(program.graph))
    assert parity.max_codes <= 3  # as for floats, above
    assert parity.changed_fraction <= 0.05
    assert parity.top1_agreement == 1
