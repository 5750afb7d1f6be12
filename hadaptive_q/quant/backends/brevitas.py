"""The Brevitas backend: its quantizers find the scales of weights and learn all scales, in the places of the plan.

The graph, the calibration of activations and the program are those of the torchao backend: there is one definition of
what is stored. While a network trains, quantizers of Brevitas stand where its fake-quantizers do; at the end their
scales are read out into these, which go back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from brevitas.core.bit_width import BitWidthConst
from brevitas.core.function_wrapper import Identity
from brevitas.core.quant import IntQuant, RescalingIntQuant
from brevitas.core.restrict_val import FloatRestrictValue
from brevitas.core.scaling import IntScaling, ParameterScaling
from brevitas.nn import QuantLinear
from brevitas.quant import Int8WeightPerChannelFloatMSE
from torch import Tensor, nn
from torch.fx import GraphModule

from hadaptive_q.quant.backends import torchao_pt2e
from hadaptive_q.quant.backends.torchao_pt2e import Calibrated, Prepared
from hadaptive_q.quant.fake_quant import PerChannelWeightFakeQuantize
from hadaptive_q.quant.formats import SMALLEST_SCALE
from hadaptive_q.quant.sites import FakeQuantizer, bits_of
from hadaptive_q.rewrite.graph import constant

EPSILON = torch.finfo(torch.float32).eps

# Learned is a scale's logarithm in units of so many octaves: Adam moves every number by about the learning rate, and
# one that suits weights would leave a plain logarithm where it is. Single numbers train at a tenth of the rate; either
# way a step at the rate of 2e-5 changes a scale by about a ten thousandth of itself.
TENSOR_UNIT, CHANNEL_UNIT = 64.0, 6.4


def calibrate(prepared: Prepared, batches: Iterable[Tensor]) -> Calibrated:
    """Give weights the scales of least squared error and activations the ranges that `batches` call for.

    Raises UserError where a tensor holds NaN or infinity.
    """
    for _, quantizer, weight in _quantizers(prepared.graph):
        if isinstance(quantizer, PerChannelWeightFakeQuantize):
            assert weight is not None
            quantizer.hold(least_error_scale(weight, bits_of(quantizer)))
    return torchao_pt2e.calibrate(prepared, batches)


@torch.no_grad()
def least_error_scale(weight: Tensor, bits: int) -> Tensor:
    """Return the scale `(C,)` of `weight` `(C, ...)` whose codes leave the least squared error per channel."""
    rows = weight.detach().flatten(1)
    layer = QuantLinear(
        rows.shape[1], rows.shape[0], bias=False, weight_quant=Int8WeightPerChannelFloatMSE, weight_bit_width=bits
    )
    layer.weight.copy_(rows)
    scale: Tensor = layer.quant_weight().scale.flatten()
    return scale


def start_fit(
    calibrated: Calibrated,
    learned: bool,
    weights: bool = False,
    dropout: bool = True,
    live: Iterable[Tensor] | None = None,
) -> None:
    """Make ready for training: ranges learned or following the batches, and scales of `weights` learned or as found."""
    torchao_pt2e.start_fit(calibrated, learned, dropout=dropout, live=live)
    learners: dict[nn.Module, LearnedQuantizer] = {}
    for name, quantizer, weight in _quantizers(calibrated.graph):
        if weights if weight is not None else learned and not quantizer.known:
            # Tensors that share a scale share one quantizer.
            if quantizer not in learners:
                learners[quantizer] = LearnedQuantizer(quantizer, 1 if weight is None else weight.dim())
            calibrated.graph.set_submodule(name, learners[quantizer])


def refine_weights(calibrated: Calibrated, bits: int) -> None:
    """Round weights of fewer bits to `bits` of them, over the same range, until they are refined to other ones."""
    torchao_pt2e.refine_weights(calibrated, bits)
    for _, learner in _learners(calibrated.graph):
        learner.refine(bits)


def freeze_ranges(calibrated: Calibrated) -> None:
    """Keep every scale from now on; weights go on training against them."""
    torchao_pt2e.freeze_ranges(calibrated)
    for _, learner in _learners(calibrated.graph):
        learner.quant.requires_grad_(False)


def end_fit(calibrated: Calibrated) -> None:
    """Back to eval behaviour, with fixed scales in the fake-quantizers that Brevitas' quantizers stood for."""
    read_out(calibrated)
    torchao_pt2e.end_fit(calibrated)


def read_out(calibrated: Calibrated) -> None:
    """Put the fake-quantizers back, with the scales that Brevitas learned."""
    for name, learner in _learners(calibrated.graph):
        calibrated.graph.set_submodule(name, learner.read_out())


class LearnedQuantizer(nn.Module):
    """Brevitas' integer quantizer with a learned scale, in the place of `origin`, from whose scale it starts.

    Formula: ``y = (clamp(round(x / s + z), low, high) - z) * s`` with ``s = 2^(u p)``, the learned `p` and a unit `u`;
    `z` stays. Shapes: `s` `(1,)`, or `(C, 1, ...)` for a weight of `dims` dimensions.
    """

    def __init__(self, origin: FakeQuantizer, dims: int) -> None:
        super().__init__()
        self.origin = origin
        narrow = isinstance(origin, PerChannelWeightFakeQuantize)
        scale, zero_point = origin.calculate_qparams()
        smallest, unit = (EPSILON, CHANNEL_UNIT) if narrow else (SMALLEST_SCALE, TENSOR_UNIT)
        top = -origin.quant_min
        scaling = ParameterScaling(
            scale.detach().reshape(-1, *(1,) * (dims - 1)) * top,
            restrict_scaling_impl=_Octaves(unit),
            restrict_threshold_impl=FloatRestrictValue(),
            scaling_min_val=smallest * top,
        )
        self.quant = RescalingIntQuant(
            IntQuant(narrow_range=narrow, signed=True, input_view_impl=Identity()),
            scaling,
            IntScaling(narrow_range=narrow, signed=True),
            _FixedZeroPoint(float(zero_point[0])),
            BitWidthConst(bits_of(origin)),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.quant(x)[0]
        return y

    def refine(self, bits: int) -> None:
        """Round weights to `bits` over the same range from now on, where they are more than its own."""
        if isinstance(self.origin, PerChannelWeightFakeQuantize):
            self.quant.msb_clamp_bit_width_impl = BitWidthConst(max(bits, bits_of(self.origin)))

    @torch.no_grad()
    def read_out(self) -> FakeQuantizer:
        """Return `origin` with the scale as it is now."""
        _, scale, *_ = self.quant(torch.zeros(1))
        if isinstance(self.origin, PerChannelWeightFakeQuantize):
            self.origin.hold(scale.flatten())
        else:
            self.origin.scale.copy_(scale)
        return self.origin


class _Octaves(nn.Module):
    """A restriction of Brevitas: a positive value, stored as its logarithm in units of `unit` octaves."""

    def __init__(self, unit: float) -> None:
        super().__init__()
        self.unit = unit

    def restrict_init_tensor(self, x: Tensor) -> Tensor:
        return x.log2() / self.unit

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.unit).exp2()


class _FixedZeroPoint(nn.Module):
    """A zero point of Brevitas that stays where calibration put it, as in training with learned steps elsewhere."""

    zero_point: Tensor

    def __init__(self, zero_point: float) -> None:
        super().__init__()
        self.register_buffer("zero_point", torch.tensor(zero_point), persistent=False)

    def forward(self, x: Tensor, scale: Tensor, bit_width: Tensor) -> Tensor:
        return self.zero_point


def _quantizers(graph: GraphModule) -> Iterator[tuple[str, FakeQuantizer, Tensor | None]]:
    """Yield the fake-quantizers of `graph` by every name they are called by, with the weight where they round one."""
    modules = dict(graph.named_modules(remove_duplicate=False))
    for node in graph.graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, FakeQuantizer):
            yield str(node.target), module, constant(graph, node.args[0])


def _learners(graph: GraphModule) -> list[tuple[str, LearnedQuantizer]]:
    modules = graph.named_modules(remove_duplicate=False)
    return [(name, module) for name, module in modules if isinstance(module, LearnedQuantizer)]
