"""Fake-quantizers whose scales are the ones that ship.

The scale used in training, the scale written at convert and the rounding are one and the same, so that the
fake-quantized network in eval mode and the converted program agree bit for bit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization.pt2e import FakeQuantizeBase

from hadaptive_q import processes
from hadaptive_q.quant.formats import SMALLEST_SCALE, ActivationFormat, WeightFormat
from hadaptive_q.quant.observers import RangeName, RangeObserver
from hadaptive_q.train.together import extremes

MOVING_AVERAGE = 0.02
SMALLEST_WEIGHT_SHARE = 2.0**-12
SMALLEST_WEIGHT_SCALE = torch.finfo(torch.float32).eps


class _FakeQuantizePerTensor(torch.autograd.Function):
    """Quantize and dequantize per tensor; gradients for `x` (straight-through) and the scale (LSQ).

    The values are those of `torch.fake_quantize_per_tensor_affine`. That and its mask go value by value on CPUs, these
    operators by vectors: a tenth of the time.
    Source of the scale's gradient: Esser et al., "Learned Step Size Quantization", ICLR 2020, equation 3.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
        shift = zero_point.to(scale.dtype)
        codes = (x * scale.reciprocal()).round_().add_(shift)
        # Of codes the gradient of `x` needs no more than x's type holds: whether they lie between `low` and `high`.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else codes.to(x.dtype), scale, shift)
        ctx.codes = low, high
        return codes.clamp(low, high).sub_(shift).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kept, scale, shift = ctx.saved_tensors
        low, high = ctx.codes
        if not ctx.needs_input_grad[1]:
            return _inside(gradient, kept, low, high), None, None, None, None
        gradient, ratio = gradient.to(scale.dtype), kept * scale.reciprocal()
        codes = ratio.round().add_(shift)
        x_gradient = _inside(gradient, codes, low, high)
        ratio = _inside(ratio, codes, low, high)
        step = codes.clamp_(low, high).sub_(shift).sub_(ratio)
        # The values of the whole batch: a process that shares it sees a part, and gradients are averaged.
        scale_gradient = step.mul_(gradient).sum() / (processes.count() * step.numel() * high) ** 0.5
        return x_gradient.to(kept.dtype), scale_gradient.reshape(scale.shape), None, None, None


class _FakeQuantizePerChannel(torch.autograd.Function):
    """The same for every channel of a weight, symmetric: axis 0, each with its scale."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        column = scale.reshape(-1, *(1,) * (w.dim() - 1))
        codes = (w * column.reciprocal()).round_()
        ctx.save_for_backward(w if ctx.needs_input_grad[1] else codes, column)
        ctx.codes = low, high
        return codes.clamp(low, high).mul_(column)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kept, column = ctx.saved_tensors
        low, high = ctx.codes
        if not ctx.needs_input_grad[1]:
            return _inside(gradient, kept, low, high), None, None, None
        ratio = kept * column.reciprocal()
        codes = ratio.round()
        w_gradient = _inside(gradient, codes, low, high)
        ratio = _inside(ratio, codes, low, high)
        step = codes.clamp_(low, high).sub_(ratio)
        scale_gradient = step.mul_(gradient).flatten(1).sum(1) / (kept[0].numel() * high) ** 0.5
        return w_gradient, scale_gradient, None, None


def _inside(x: Tensor, codes: Tensor, low: int, high: int) -> Tensor:
    """Return `x` where ``low <= codes <= high`` and 0 elsewhere, in one pass: hardtanh's gradient has open bounds."""
    return torch.ops.aten.hardtanh_backward(x, codes, low - 1, high + 1)  # type: ignore[no-any-return]


class _FakeQuantize(FakeQuantizeBase):  # type: ignore[misc]
    """The phase of a fake-quantizer, as plain values beside torchao's buffers.

    A branch on a buffer waits for the device, and breaks a compiled graph in two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.watching = self.rounding = True

    def enable_observer(self, enabled: bool = True) -> None:
        super().enable_observer(enabled)
        self.watching = enabled

    def enable_fake_quant(self, enabled: bool = True) -> None:
        super().enable_fake_quant(enabled)
        self.rounding = enabled

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.watching, self.rounding = bool(self.observer_enabled[0]), bool(self.fake_quant_enabled[0])


class ActivationFakeQuantize(_FakeQuantize):
    """Per-tensor affine fake-quantizer of an activation.

    Formula: ``y = (clamp(round(x / s) + z, low, high) - z) * s``; `s` float32 `(1,)`, `z` int32 `(1,)`.
    Phases: `observe` (values pass and are watched), then quantizing with ranges that are fixed, that follow
    a moving average of the batch (`follow`), or whose scale is learned (`learn`; the zero point stays).
    `symmetric` keeps the zero point at 0: the larger end decides the scale. `known`, a range given from the start, is
    kept in every phase.
    """

    scale: Tensor
    zero_point: Tensor
    dtype = torch.int8
    qscheme = torch.per_tensor_affine
    is_dynamic = False

    def __init__(
        self,
        observer: RangeName = "minmax",
        quant_min: int = -128,
        quant_max: int = 127,
        floor: float = -math.inf,
        symmetric: bool = False,
        known: tuple[float, float] | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.quant_min, self.quant_max = quant_min, quant_max
        self.symmetric = symmetric
        self.known = known
        self.observer = RangeObserver(observer, quant_max - quant_min + 1, floor)
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.int32))
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.follow = False
        self.observe()

    low: Tensor
    high: Tensor

    def observe(self) -> None:
        """Watch values and pass them on unchanged."""
        self.enable_observer()
        self.disable_fake_quant()

    def fix(self) -> None:
        """End observation: compute the scale and quantize from now on."""
        low, high = (self.low.new_tensor(end) for end in self.known) if self.known else self.observer.range()
        self.set_range(low, high)

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Quantize from now on with codes for the interval from `low` to `high`, scalars around 0."""
        self.low, self.high = low.clone(), high.clone()
        self._set_qparams()
        self.disable_observer()
        self.enable_fake_quant()

    def learn(self, active: bool) -> None:
        """Let the optimizer move the scale, or stop it."""
        self.scale.requires_grad_(active and not self.known)

    def forward(self, x: Tensor) -> Tensor:
        if self.watching:
            self.observer.watch(x)
        if not self.rounding:
            return x
        if self.follow and not self.known and torch.is_grad_enabled():
            self._follow(x)
        # The optimizer may have stepped below the smallest scale; what is used is what would be written.
        scale = self.scale.clamp_min(SMALLEST_SCALE)
        out: Tensor = _FakeQuantizePerTensor.apply(x, scale, self.zero_point, self.quant_min, self.quant_max)
        return out

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        return self.scale.detach().clamp_min(SMALLEST_SCALE), self.zero_point

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        # Not `aminmax`, which copies what is not contiguous.
        low, high = extremes(x.amin(), x.amax())
        self.low.lerp_(low.clamp(self.observer.floor, 0), MOVING_AVERAGE)
        self.high.lerp_(high.clamp_min(0), MOVING_AVERAGE)
        self._set_qparams()

    @torch.no_grad()
    def _set_qparams(self) -> None:
        if self.symmetric:
            scale = torch.maximum(-self.low, self.high) / self.quant_max
            zero_point = torch.zeros_like(scale)
        else:
            scale = (self.high - self.low) / (self.quant_max - self.quant_min)
            zero_point = self.quant_min - self.low / scale.clamp_min(SMALLEST_SCALE)
        scale = scale.clamp_min(SMALLEST_SCALE)
        zero_point = zero_point.round().clamp(self.quant_min, self.quant_max)
        self.scale.copy_(scale.reshape(1))
        # A new tensor: parts that share a scale come by once each, and the first one's is kept for its gradient.
        self.zero_point = zero_point.reshape(1).to(torch.int32)


class PerChannelWeightFakeQuantize(_FakeQuantize):
    """Per-output-channel symmetric fake-quantizer of a weight.

    Formula: ``s_c = max |w_c| / high`` of the weight as it is now, ``y = clamp(round(w / s_c), -high, high) * s_c``.
    `hold` keeps scales found elsewhere instead, which may be learned. With 4 bits or fewer no `s_c` is below 2^-12 of
    the largest. While `refine` has it, the same range is cut into more codes. Shapes: `w` `(C, ...)`, `s` `(C,)`.
    (torchao derives its constructor arguments from "PerChannel" in the name.)
    """

    scale: Tensor
    zero_point: Tensor
    dtype = torch.int8
    qscheme = torch.per_channel_symmetric
    is_dynamic = False
    ch_axis = 0

    def __init__(self, quant_min: int = -127, quant_max: int = 127, **_: Any) -> None:
        super().__init__()
        self.quant_min, self.quant_max = quant_min, quant_max
        self.refined_max = 0
        self.scale = nn.Parameter(torch.empty(0), requires_grad=False)
        self.register_buffer("zero_point", torch.empty(0, dtype=torch.int32))

    def forward(self, w: Tensor) -> Tensor:
        if self.watching:
            self.set_scale(w.detach().flatten(1).abs().amax(1) / self.quant_max)
        if not self.rounding:
            return w
        # The optimizer may have stepped below the smallest scale; what is used is what would be written.
        top = max(self.quant_max, self.refined_max)
        scale = self.scale.clamp_min(SMALLEST_WEIGHT_SCALE) * (self.quant_max / top)
        out: Tensor = _FakeQuantizePerChannel.apply(w, scale, -top, top)
        return out

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        return self.scale.detach().clamp_min(SMALLEST_WEIGHT_SCALE), self.zero_point

    def hold(self, scale: Tensor) -> None:
        """Keep `scale` `(C,)` from now on, whatever becomes of the weight."""
        self.set_scale(scale)
        self.disable_observer()

    def refine(self, bits: int) -> None:
        """Round to `bits` over the same range from now on, where they are more than its own."""
        self.refined_max = WeightFormat(bits).code_range[1]

    def learn(self, active: bool) -> None:
        """Let the optimizer move a scale that is held, or stop it."""
        self.scale.requires_grad_(active and not self.watching)

    @torch.no_grad()
    def set_scale(self, scale: Tensor) -> None:
        """Quantize with `scale` `(C,)`."""
        if self.quant_max <= WeightFormat(4).code_range[1]:
            # The bias of a channel of all but no weights would not fit the accumulator; what those weights add never
            # shows beside the largest channel's, in codes of one scale.
            scale = scale.clamp_min(float(scale.max()) * SMALLEST_WEIGHT_SHARE)
        if self.scale.shape != scale.shape:
            self.scale = nn.Parameter(torch.empty_like(scale), requires_grad=False)
            self.zero_point = torch.zeros_like(scale, dtype=torch.int32)
        self.scale.copy_(scale.clamp_min(SMALLEST_WEIGHT_SCALE))


def activation_constructor(
    form: ActivationFormat,
    observer: RangeName,
    floor: float = -math.inf,
    known: tuple[float, float] | None = None,
) -> Any:
    """Return the constructor torchao calls for a quantized tensor.

    Its values below `floor` are all alike; its range is `known` where that is given.
    """
    low, high = form.code_range
    return ActivationFakeQuantize.with_args(observer=observer, quant_min=low, quant_max=high, floor=floor, known=known)


def weight_constructor(form: WeightFormat) -> Any:
    """Return the constructor torchao calls for every quantized weight."""
    low, high = form.code_range
    return PerChannelWeightFakeQuantize.with_args(quant_min=low, quant_max=high)
