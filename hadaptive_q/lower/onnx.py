"""Lower a quantized program to an ONNX file with QuantizeLinear and DequantizeLinear, and run one in onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from onnxruntime.capi import onnxruntime_pybind11_state as native
from torch import Tensor
from torch.fx import GraphModule, Node

from hadaptive_q.data.datasets import Split
from hadaptive_q.errors import UserError
from hadaptive_q.lower.file_input import FileInput
from hadaptive_q.lower.quiet import quiet
from hadaptive_q.lower.tidy_onnx import MOVING, drop_remarks, move_codes, store_four_bits
from hadaptive_q.models.config import Preprocess
from hadaptive_q.quant.arithmetic import Grid
from hadaptive_q.quant.formats import WeightFormat
from hadaptive_q.quant.program import QuantizedProgram
from hadaptive_q.rewrite.graph import calls, constant

# The first with INT4.
OPSET = 21
_TYPES = {"tensor(float)": "float32", "tensor(uint8)": "uint8"}
_FATAL = 4  # of onnxruntime's levels of logging, the highest
_REFUSALS = (
    native.Fail,
    native.InvalidArgument,
    native.InvalidGraph,
    native.InvalidProtobuf,
    native.NotImplemented,
    native.RuntimeException,
    UnicodeDecodeError,  # a name that is no text
)


def to_onnx(program: QuantizedProgram) -> bytes:
    """Return `program` as an ONNX file for `images` as it takes them, any number of them; output `logits`.

    4-bit weights are stored as INT4. The same program gives the same bytes. Raises RuntimeError where the file's scales
    are not the program's.
    """
    with quiet("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "root"):
        exported = torch.onnx.export(
            program.export(batch=None),
            (),
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
        )
    assert exported is not None
    model = exported.model_proto
    drop_remarks(model)
    move_codes(model)
    store_four_bits(model, _four_bit_codes(program.shipped_graph()))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.checker.check_model(model, full_check=True)
    check_scales(program, model)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


@dataclass(frozen=True)
class Scales:
    """Every number a network is quantized with.

    `activations`: in the order of the data, the grid that makes the codes of a tensor and those that read them.
    `images`: those that read an input of bytes.
    `weights`: codes (int8), scales (float32), zero points (int8), as bytes and sorted.
    """

    activations: tuple[tuple[Grid, frozenset[Grid]], ...]
    images: frozenset[Grid]
    weights: tuple[tuple[bytes, bytes, bytes], ...]


def check_scales(program: QuantizedProgram, model: Any) -> None:
    """Raise RuntimeError unless the ONNX `model` quantizes every tensor of `program` with the very same numbers."""
    wanted, found = program_scales(program.shipped_graph()), onnx_scales(model)
    for part in ("images", "activations", "weights"):
        if getattr(wanted, part) != getattr(found, part):
            raise RuntimeError(f"the ONNX graph does not quantize the {part} as the program does")


def program_scales(graph: GraphModule) -> Scales:
    """Return the numbers of a converted graph."""
    ops = torch.ops.quantized_decomposed
    quantizers = calls(graph, ops.quantize_per_tensor.default)
    activations = tuple((_grid(q), frozenset(_grid(reader) for reader in q.users)) for q in quantizers)
    weights = [_program_weight(graph, node) for node in calls(graph, ops.dequantize_per_channel.default)]
    (image,) = (node for node in graph.graph.nodes if node.op == "placeholder")
    images = frozenset(_grid(reader) for reader in image.users if reader.target == ops.dequantize_per_tensor.default)
    return Scales(activations, images, tuple(sorted(weights)))


def _four_bit_codes(graph: GraphModule) -> set[bytes]:
    weights = calls(graph, torch.ops.quantized_decomposed.dequantize_per_channel.default)
    return {_program_weight(graph, node)[0] for node in weights if node.args[4:6] == WeightFormat(4).code_range}


def _grid(node: Node) -> Grid:
    scale, zero_point = node.args[1:3]
    assert isinstance(scale, float)
    assert isinstance(zero_point, int)
    return Grid(scale, zero_point)


def _program_weight(graph: GraphModule, node: Node) -> tuple[bytes, bytes, bytes]:
    codes, scales, zero_points = (constant(graph, argument) for argument in node.args[:3])
    assert codes is not None
    assert scales is not None
    assert zero_points is not None
    stored = (codes.to(torch.int8), scales.to(torch.float32), zero_points.to(torch.int8))
    first, second, third = (tensor.contiguous().numpy().tobytes() for tensor in stored)
    return first, second, third


def onnx_scales(model: Any) -> Scales:
    """Return the numbers of an ONNX model whose scales and zero points are constants."""
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}

    def grid(node: Any) -> Grid:
        _, scale, zero_point = node.input
        return Grid(float(values[scale]), int(values[zero_point]))

    moved = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type in MOVING}
    quantizers = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    dequantizers = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    (image,) = model.graph.input
    readers: dict[str, set[Grid]] = {name: set() for name in (image.name, *(node.output[0] for node in quantizers))}
    weights = []
    for node in dequantizers:
        if node.input[0] in values:
            codes, scales, zero_points = (values[name] for name in node.input)
            weights.append((codes.astype("int8").tobytes(), scales.tobytes(), zero_points.astype("int8").tobytes()))
        else:
            source = node.input[0]
            while source not in readers:
                source = moved[source]
            readers[source].add(grid(node))
    activations = tuple((grid(node), frozenset(readers[node.output[0]])) for node in quantizers)
    return Scales(activations, frozenset(readers[image.name]), tuple(sorted(weights)))


class OnnxFile:
    """A loaded ONNX file that takes images, as `input` says, and returns logits `(B, classes)`, on this CPU.

    Raises UserError where onnxruntime refuses the file or it takes something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise UserError(f"file {path}", "no such file", "an .onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = _FATAL  # a refusal is raised; it need not be printed, too
        try:
            self._session = onnxruntime.InferenceSession(
                str(path),
                options,
                providers=["CPUExecutionProvider"],
                enable_fallback=0,  # it would print, and try the same once more
            )
            inputs = [(given.name, given.type, given.shape) for given in self._session.get_inputs()]
        except _REFUSALS as error:
            raise UserError(f"file {path}", f"'{error}'", "an .onnx that onnxruntime loads") from error
        self._name, self.input = self._images(inputs)

    def _images(self, inputs: Sequence[tuple[str, str, Any]]) -> tuple[str, FileInput]:
        """Return the name of the one input and what it takes, a free batch dimension as 1."""
        for name, type_, shape in inputs if len(inputs) == len(self._session.get_outputs()) == 1 else []:
            match type_, shape:
                case ("tensor(float)", [batch, 3, int(), int()]) | (
                    "tensor(uint8)",
                    [batch, 3, int(), int()] | [batch, int(), int(), 3],
                ):
                    sizes = (batch if isinstance(batch, int) else 1, *shape[1:])
                    return name, FileInput(_TYPES[type_], sizes)
        found = ", ".join(f"{name} {type_} {shape}" for name, type_, shape in inputs)
        raise UserError(
            f"file {self.path}",
            f"inputs {found}",
            "images (batch, 3, S, S), or uint8 also with channels last, alone, and one output",
        )

    def __call__(self, inputs: Tensor) -> Tensor:
        """Run inputs of the file's type; any B where the file leaves it free."""
        try:
            (out,) = self._session.run(None, {self._name: inputs.contiguous().numpy()})
        except _REFUSALS as error:
            raise UserError(f"file {self.path}", f"'{error}'", f"an input {self.input}") from error
        return torch.from_numpy(out)

    def predict(self, split: Split, preprocess: Preprocess) -> Tensor:
        """Return logits `(N, classes)` over a whole split, one image at a time, as a phone would."""
        return torch.cat([self(self.input.of(split[i][0][None], preprocess)) for i in range(len(split))])
