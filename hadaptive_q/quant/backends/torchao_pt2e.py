"""The torchao backend: PT2E prepare and convert, with a quantizer that carries out a `Plan`.

Each step returns a type of its own, so that a wrong order does not type-check:
`prepare` -> Prepared, `calibrate` -> Calibrated, (`start_fit`, training, `end_fit`,) `convert` -> QuantizedProgram.
`restore` takes the place of `calibrate` where a run was saved.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save
from torch import Tensor
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from hadaptive_q.errors import UserError, first_line
from hadaptive_q.models.config import InputName, Preprocess
from hadaptive_q.quant.fake_quant import (
    ActivationFakeQuantize,
    PerChannelWeightFakeQuantize,
    activation_constructor,
    weight_constructor,
)
from hadaptive_q.quant.formats import ActivationFormat, WeightFormat
from hadaptive_q.quant.joint_ranges import CrossProduct, JointRanges, find_multiplications
from hadaptive_q.quant.live_batch_norm import refold_batch_norm, unfold_batch_norm
from hadaptive_q.quant.observers import ObserverName, RangeName
from hadaptive_q.quant.outliers import drop_outliers
from hadaptive_q.quant.plan import WEIGHTED, Plan
from hadaptive_q.quant.portable_products import settle_products
from hadaptive_q.quant.program import QuantizedProgram
from hadaptive_q.rewrite.drop_no_ops import drop_no_ops
from hadaptive_q.rewrite.graph import calls, constant, module_path, set_dropout
from hadaptive_q.rewrite.products import find_products
from hadaptive_q.rewrite.record import record
from hadaptive_q.rewrite.split_dequantize import split_dequantize

# The runtime keeps accumulators of 4-bit weights times 16 in 32 bits; half of what is left is for the products.
LARGEST_SHIFTED_BIAS = 2**26


@dataclass(frozen=True)
class Prepared:
    """The deploy graph with a fake-quantizer at every tensor the plan quantizes; nothing measured yet.

    `together` are ranges to be chosen together.
    """

    graph: GraphModule
    plan: Plan
    together: tuple[JointRanges, ...] = ()


@dataclass(frozen=True)
class Calibrated:
    """Every activation range is known; the graph computes what the converted program will."""

    graph: GraphModule
    plan: Plan


class PlanQuantizer(Quantizer):  # type: ignore[misc]
    """Turn a plan into PT2E annotations: tensors are annotated where they are made, weights where they are read."""

    def __init__(self, plan: Plan, observer: RangeName) -> None:
        self.plan, self.observer = plan, observer

    def annotate(self, model: GraphModule) -> GraphModule:
        nodes = {node.name: node for node in model.graph.nodes}
        for name in {**self.plan.activations, **self.plan.weights}:
            form, shared = self.plan.activations.get(name), self.plan.shared.get(name)
            # What a clamp alone reads of a layer is stored behind the clamp.
            spec = SharedQuantizationSpec(nodes[shared]) if shared else form and self._activation(name, form)
            node = nodes[name]
            node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
                input_qspec_map=self._weight(node), output_qspec=spec, _annotated=True
            )
        return model

    def validate(self, model: GraphModule) -> None:
        pass

    def _weight(self, node: Node) -> dict[Node, QuantizationSpec]:
        form = self.plan.weights.get(node.name)
        if form is None:
            return {}
        weight = node.args[1]
        assert isinstance(weight, Node)
        return {weight: _weight_spec(form)}

    def _activation(self, name: str, form: ActivationFormat) -> QuantizationSpec:
        low, high = form.code_range
        floor, known = self.plan.floors.get(name, -math.inf), self.plan.ranges.get(name)
        return QuantizationSpec(
            dtype=torch.int8,
            observer_or_fake_quant_ctr=activation_constructor(form, self.observer, floor, known),
            quant_min=low,
            quant_max=high,
            qscheme=torch.per_tensor_affine,
        )


def _weight_spec(form: WeightFormat) -> QuantizationSpec:
    low, high = form.code_range
    return QuantizationSpec(
        dtype=torch.int8,
        observer_or_fake_quant_ctr=weight_constructor(form),
        quant_min=low,
        quant_max=high,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )


def prepare(graph: GraphModule, plan: Plan, observer: ObserverName) -> Prepared:
    """Insert the fake-quantizers of `plan` into `graph` (in place).

    `observer` "product" chooses the ranges around products together; all other tensors use "histogram".
    """
    if observer != "product":
        return Prepared(prepare_pt2e(graph, PlanQuantizer(plan, observer)), plan)
    products = find_products(graph)
    prepared = prepare_pt2e(graph, PlanQuantizer(plan, "histogram"))
    crossed = [CrossProduct(prepared, product) for product in products]
    return Prepared(prepared, plan, (*crossed, *find_multiplications(prepared)))


@torch.no_grad()
def calibrate(prepared: Prepared, batches: Iterable[Tensor]) -> Calibrated:
    """Watch `batches` of network inputs without their outliers, then fix every range.

    Raises UserError where a tensor holds NaN or infinity.
    """
    quantizers = list(activation_quantizers(prepared.graph))
    for quantizer in quantizers:
        quantizer.disable_observer()
    ordinary = drop_outliers(prepared.graph, quantizers, list(batches))
    for quantizer in quantizers:
        quantizer.observe()
    names = set[str]().union(*(each.names for each in prepared.together))
    for index, inputs in enumerate(ordinary):
        try:
            values = record(prepared.graph, inputs, names)
        except FloatingPointError as error:
            raise UserError(
                f"calibration, batch {index + 1}",
                str(error),
                "finite activations",
                "check the checkpoint and the images",
            ) from error
        for each in prepared.together:
            each.watch(values)
    choosers = [each.chooser() for each in prepared.together]
    for quantizer in quantizers:
        quantizer.fix()
    for choose in choosers:
        choose()
    for weights in _weight_quantizers(prepared.graph):
        if _few_bits(weights):
            # With few codes, rounding and training choose weights for the scale they have.
            weights.hold(weights.calculate_qparams()[0])
    settle_products(prepared.graph)
    snap_biases(prepared.graph)
    return Calibrated(prepared.graph, prepared.plan)


def saved(calibrated: Calibrated) -> bytes:
    """Return the state of a calibrated graph as safetensors for `restore`; the same state gives the same bytes.

    Tensors that share a fake-quantizer are in it once, by their first name.
    """
    # Not the library's save_model: it notes the other names down, in an order of its own every time.
    first: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in sorted(calibrated.graph.state_dict().items()):
        first.setdefault(tensor.data_ptr(), (name, tensor))
    return save({name: tensor.contiguous() for name, tensor in first.values()})


@torch.no_grad()
def restore(prepared: Prepared, path: Path) -> Calibrated:
    """Load the state that a calibrated graph was saved with (`*.safetensors`); it computes what that one did.

    Raises UserError where the file is broken or belongs to another graph.
    """
    modules = dict(prepared.graph.named_modules())
    for node in prepared.graph.graph.nodes:
        quantizer = modules.get(str(node.target))
        if isinstance(quantizer, PerChannelWeightFakeQuantize):
            # Its scale has no shape before it has seen its weight, and loading wants the shape that was saved.
            quantizer(constant(prepared.graph, node.args[0]))
    try:
        load_model(prepared.graph, path)
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = first_line(error)
        raise UserError(str(path), f"'{reason}'", "the state this run saved", "run it again") from error
    return Calibrated(prepared.graph, prepared.plan)


def start_fit(
    calibrated: Calibrated,
    learned: bool,
    weights: bool = False,
    dropout: bool = True,
    live: Iterable[Tensor] | None = None,
) -> None:
    """Make ready for training: ranges learned or following the batches, dropout, BatchNorm live over `live`.

    `weights` has the fixed scales of weights learned, too.
    """
    if live is not None:
        unfold_batch_norm(calibrated.graph, live)
    set_dropout(calibrated.graph, active=dropout)
    for quantizer in activation_quantizers(calibrated.graph):
        quantizer.learn(learned)
        quantizer.follow = not learned
    for each in _weight_quantizers(calibrated.graph):
        each.learn(weights)


def refine_weights(calibrated: Calibrated, bits: int) -> None:
    """Round weights of fewer bits to `bits` of them, over the same range, until they are refined to other ones."""
    for quantizer in _weight_quantizers(calibrated.graph):
        quantizer.refine(bits)


def freeze_ranges(calibrated: Calibrated) -> None:
    """Keep every range and scale from now on; weights go on training against them."""
    for quantizer in activation_quantizers(calibrated.graph):
        quantizer.learn(False)
        quantizer.follow = False
    for each in _weight_quantizers(calibrated.graph):
        each.learn(False)


def end_fit(calibrated: Calibrated) -> None:
    """Back to eval behaviour: BatchNorm folded, dropout off, ranges fixed."""
    refold_batch_norm(calibrated.graph)
    freeze_ranges(calibrated)
    set_dropout(calibrated.graph, active=False)
    settle_products(calibrated.graph)
    snap_biases(calibrated.graph)


@torch.no_grad()
def snap_biases(graph: GraphModule) -> None:
    """Round every bias to the integer grid on which the runtime adds it: ``round(b / (s_x s_w)) s_x s_w``.

    The runtime stores biases as int32 of that scale. Left in float, they would shift every accumulator of the program
    against the file's by a fraction of its step, and a few results in a thousand by one code.
    Raises UserError for a bias that leaves an accumulator of 4-bit weights no room.
    """
    for node in graph.graph.nodes:
        found = bias_codes(graph, node)
        if found is None:
            continue
        bias, codes, step = found
        if has_few_bits(graph, node) and codes.abs().max() > LARGEST_SHIFTED_BIAS:
            name = module_path(node)
            raise UserError(
                name,
                f"a bias of {codes.abs().max():.0f} steps of its accumulator",
                f"at most {LARGEST_SHIFTED_BIAS} with 4-bit weights",
                f"quantize.layers.{name}=8",
            )
        bias.copy_(codes * step)


def bias_codes(graph: GraphModule, node: Node) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the bias of the quantized layer `node`, its codes (unclipped) and their step ``s_x s_w``, per channel.

    None where `node` is no such layer or has no bias.
    """
    bias = constant(graph, node.args[2]) if node.target in WEIGHTED and len(node.args) > 2 else None
    quantizers = [_module(graph, argument) for argument in node.args[:2]] if bias is not None else []
    if bias is None or not isinstance(quantizers[0], ActivationFakeQuantize):
        return None
    weight = constant(graph, node.args[1].args[0])  # type: ignore[union-attr]
    assert weight is not None
    quantizer = weight_quantizer(graph, node)
    quantizer(weight)
    step = quantizers[0].calculate_qparams()[0].double() * quantizer.calculate_qparams()[0].double()
    return bias, (bias.double() / step).round(), step


def has_few_bits(graph: GraphModule, node: Node) -> bool:
    """Whether the weights of the quantized layer `node` are rounded to 4 bits or fewer."""
    return _few_bits(weight_quantizer(graph, node))


def _few_bits(quantizer: PerChannelWeightFakeQuantize) -> bool:
    few: bool = quantizer.quant_max <= WeightFormat(4).code_range[1]
    return few


def weight_quantizer(graph: GraphModule, node: Node) -> PerChannelWeightFakeQuantize:
    """Return the fake-quantizer of the weights of the layer `node`."""
    found = _module(graph, node.args[1])
    assert isinstance(found, PerChannelWeightFakeQuantize)
    return found


def _module(graph: GraphModule, node: object) -> torch.nn.Module | None:
    return graph.get_submodule(str(node.target)) if isinstance(node, Node) and node.op == "call_module" else None


def convert(calibrated: Calibrated, preprocess: Preprocess, input_: InputName = "float32") -> QuantizedProgram:
    """Replace the fake-quantizers by quantize/dequantize operators with their scales; weights become codes.

    `input_` is what the program will take where it is exported, and what it was planned for.
    """
    graph = calibrated.graph
    for quantizer in _weight_quantizers(graph):
        quantizer.enable_fake_quant()
    # One pass measures every weight as it is now: convert reads the scales, not the weights.
    with torch.no_grad():
        graph(torch.zeros(2, 3, preprocess.image_size, preprocess.image_size))
    converted = convert_pt2e(graph)
    _name_stored_ranges(converted, calibrated.plan)
    drop_no_ops(converted)
    split_dequantize(converted)
    return QuantizedProgram(converted, calibrated.plan, preprocess, input_)


def _name_stored_ranges(graph: GraphModule, plan: Plan) -> None:
    """Give the dequantize operators of weights the bounds of what is stored; they are no part of the arithmetic."""
    for node in calls(graph, torch.ops.quantized_decomposed.dequantize_per_channel.default):
        (layer,) = node.users
        codes, scale, zero_point, axis, _, _, dtype = node.args
        node.args = (codes, scale, zero_point, axis, *plan.weights[layer.name].stored_range, dtype)


def activation_quantizers(graph: GraphModule) -> Iterator[ActivationFakeQuantize]:
    """Yield every activation quantizer once, also where tensors share it."""
    for module in graph.modules():
        if isinstance(module, ActivationFakeQuantize):
            yield module


def _weight_quantizers(graph: GraphModule) -> Iterator[PerChannelWeightFakeQuantize]:
    for module in graph.modules():
        if isinstance(module, PerChannelWeightFakeQuantize):
            yield module
