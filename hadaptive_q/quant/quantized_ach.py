"""ACH with quantization: what it trains as, and the integer arithmetic that it stands for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hadaptive_q.models.ach import ACH, DySoft, gather_channels, top_channels
from hadaptive_q.models.cross_hadamard import cross_hadamard, pair_indices
from hadaptive_q.quant import arithmetic, float_kernels
from hadaptive_q.quant.arithmetic import Grid
from hadaptive_q.quant.fake_quant import ActivationFakeQuantize, PerChannelWeightFakeQuantize
from hadaptive_q.quant.observers import RangeName
from hadaptive_q.rewrite.equalise_products import choose_gain
from hadaptive_q.rewrite.fold_batch_norm import affine
from hadaptive_q.rewrite.fold_dysoft import fold_parameters


class ACHCodes(NamedTuple):
    """Codes of X~ `(B, C, H, W)` and of the normed products `(B, E, H, W)`, int8, each on a grid of its own."""

    mixed: Tensor
    products: Tensor


class QuantizedACH(nn.Module):
    """Quantization-aware ACH: fake-quantized in `forward`, in integers in `integer`.

    Shapes: `(B, C, H, W) -> (B, C + E, H, W)` with ``E = cs (cs - 1) / 2``; slots row-major, ``i < j``.

    Integer arithmetic, for codes x on the grid (s_x, z_x), step by step, with ranges and bits:

    1. Pointwise convolution with the BatchNorm folded in: ``acc = b + sum_c (x_c - z_x) w_c``, offsets 9 bits, weights
       8 bits in +-127, bias int32 in steps of ``s_x s_w``, accumulator 32 bits (needed: 17 + ceil(log2 C));
       ``m = clamp(round(acc f) + z_m, -128, 127)`` with one fp32 multiplication by ``f = s_x s_w / s_m``, half to even.
    2. Scores (fp32, per-sample selection only): ``xi = conv1d_k5(mean_hw((m - z_m) s_m))``, in the runtime's order of
       sums. The `cs` largest are chosen; of equal scores the lower channel comes first. Slot order "channel" then
       sorts the chosen by channel. Codes are copied, not scaled: the choice itself loses nothing.
    3. Products ``p = (m_i - z_m)(m_j - z_m)``, exact. With ``z_m = 0`` (`symmetric`, the default) operands have 8 bits
       and |p| <= 128^2 = 2^14: 16 bits. Otherwise offsets have 9 bits and |p| <= 255^2 < 2^16: 17 bits, so 32.
    4. Norm, fp32: for DySoft ``t = |a| s_m^2 p``, ``u = t / (1 + |t|)`` in (-1, 1), ``y = r u + c`` with
       ``r = |w| / |g|`` in [0, 1], ``c = b / g`` in [-1, 1] and the gain ``g = sign(a w) max(|w|, |b|, 2^-10)``, which
       the reader's weights take in: ``norm(Q) = g y``. p is exact in fp32; the factor, u and y round once per operator.
       For a BatchNorm with scale s and shift t per slot: ``y = (s / g) s_m^2 p + t / g`` with the gain g that evens
       its slots out (`rewrite.equalise_products`).
    5. ``q = clamp(round(y / s_y) + z_y, -128, 127)``, 8 bits. X~ and the products never share a scale: X~ is unbounded,
       y is not, and the larger would take the codes of the smaller.

    The grid of y needs no calibration behind DySoft: it covers [min(c - r), max(c + r)], which follows from w and b.
    What b costs: without it ``y = u`` and s_y = 2 / 255; with it the interval widens to at most [-2, 2], one bit for
    every slot, by the largest |b / w| of any; where |b| > |w|, a slot also uses only the share r of it and takes a
    multiplication more. It cannot move into the reader's bias, because zero padding would not see it.

    `forward` fake-quantizes inputs, weights, X~ and y, and puts the bias on its grid; it equals `integer` but for the
    roundings of fp32 sums and of products in another order (single codes). Gradients reach everything but the scorer,
    whose choice has none here. `frozen` `(cs,)` replaces the choice by fixed channels.
    """

    scorer: Tensor
    pair_i: Tensor
    pair_j: Tensor
    frozen: Tensor | None

    def __init__(self, ach: ACH, observer: RangeName = "minmax", symmetric: bool = True) -> None:
        """Take over the weights of `ach`, its BatchNorm folded; ranges are those of `calibrate`."""
        super().__init__()
        self.cs, self.slot_order = ach.cs, ach.slot_order
        weight, bias = _folded(ach.pointwise, ach.bn)
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.register_buffer("scorer", ach.scorer.weight.detach().clone())
        for name, value in zip(("pair_i", "pair_j"), pair_indices(ach.cs), strict=True):
            self.register_buffer(name, value, persistent=False)
        self.register_buffer("frozen", None if ach.frozen is None else ach.frozen.clone())
        self.norm = _DySoftSlots(ach.norm) if isinstance(ach.norm, DySoft) else _AffineSlots(ach.norm, ach.cs)
        self.quantize_weight = PerChannelWeightFakeQuantize()
        self.quantize_weight(self.weight)  # gives its buffers the shapes that a checkpoint has
        self.quantize_input = ActivationFakeQuantize(observer)
        self.quantize_mixed = ActivationFakeQuantize(observer, symmetric=symmetric)
        self.quantize_products = ActivationFakeQuantize(observer)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Watch `batches` of inputs `(B, C, H, W)`, then fix every range."""
        for inputs in batches:
            self(inputs)
        for quantizer in (self.quantize_input, self.quantize_mixed):
            quantizer.fix()
        if self.norm.bounds() is None:
            self.quantize_products.fix()
        self._follow_norm()

    @property
    def gain(self) -> Tensor:
        """What a reader multiplies the products' values by, per slot `(E,)`."""
        return self.norm.gain().detach().flatten()

    @property
    def input_grid(self) -> Grid:
        return _grid(self.quantize_input)

    @property
    def mixed_grid(self) -> Grid:
        return _grid(self.quantize_mixed)

    @property
    def products_grid(self) -> Grid:
        return _grid(self.quantize_products)

    def forward(self, x: Tensor) -> Tensor:
        x = self.quantize_input(x)
        mixed = self.quantize_mixed(F.conv2d(x, self.quantize_weight(self.weight), self._snapped_bias()))
        products = cross_hadamard(gather_channels(mixed, self._choose(mixed)))
        if self.training:
            self._follow_norm()
        normed = self.norm.gain() * self.quantize_products(self.norm(products))
        return torch.cat((mixed, normed), dim=1)

    @torch.no_grad()
    def integer(self, codes: Tensor) -> ACHCodes:
        """Return the codes of X~ and of the products for input codes `(B, C, H, W)` int8, bit for bit as above."""
        source, mid, out = self.input_grid, self.mixed_grid, self.products_grid
        weight, scale = self._weight_codes()
        bias = arithmetic.quantize_bias(self.bias, source.scale, scale)
        factor = arithmetic.multiplier(source.scale, scale, mid.scale)
        taps = arithmetic.Taps()
        mixed = arithmetic.conv2d(codes, weight, bias, source.zero_point, factor, mid.zero_point, taps)
        chosen = gather_channels(mixed, self._choose(arithmetic.dequantize(mixed, mid)))
        products = multiply_pairs(chosen, mid.zero_point, self.pair_i, self.pair_j)
        return ACHCodes(mixed, arithmetic.quantize(self.norm.on_products(products, mid.scale), out))

    @torch.no_grad()
    def _choose(self, mixed: Tensor) -> Tensor:
        """Return the chosen channels `(B, cs)`, by scores in the runtime's order of sums."""
        if self.frozen is not None:
            return self.frozen.expand(mixed.shape[0], -1)
        means = float_kernels.mean_hw(mixed).reshape(-1, 1, mixed.shape[1])
        scores = float_kernels.conv1d(means, self.scorer, padding=2).flatten(1)
        chosen = top_channels(scores, self.cs)
        return chosen.sort(dim=1).values if self.slot_order == "channel" else chosen

    def _snapped_bias(self) -> Tensor:
        """The bias on the grid of the accumulator; its gradient passes straight through."""
        if not self.quantize_input.rounding:
            return self.bias
        with torch.no_grad():
            step = self.quantize_input.calculate_qparams()[0].double() * self.quantize_weight.scale.double()
            snapped = ((self.bias.double() / step).round() * step).float()
        return self.bias + (snapped - self.bias).detach()

    def _weight_codes(self) -> tuple[Tensor, Tensor]:
        """Return the int8 weights and their scales `(C,)`, as they are now."""
        self.quantize_weight(self.weight)
        scale, top = self.quantize_weight.scale, self.quantize_weight.quant_max
        codes = (self.weight * (1.0 / scale).reshape(-1, 1, 1, 1)).round().clamp(-top, top)
        return codes.to(torch.int8), scale

    @torch.no_grad()
    def _follow_norm(self) -> None:
        """Give the products the range that their norm's parameters imply, once ranges are used at all."""
        bounds = self.norm.bounds()
        if bounds is not None and not self.quantize_mixed.watching:
            self.quantize_products.set_range(*bounds)


def multiply_pairs(chosen: Tensor, zero_point: int, i: Tensor, j: Tensor) -> Tensor:
    """Return the exact products of codes' offsets, ``(q_i - z)(q_j - z)``.

    int16 where ``z = 0`` (|p| <= 2^14), int32 otherwise (|p| <= 255^2, which takes 17 bits).
    """
    offsets = chosen.to(torch.int16 if zero_point == 0 else torch.int32) - zero_point
    return offsets[:, i] * offsets[:, j]


class _DySoftSlots(nn.Module):
    """DySoft with its gain taken out: ``y = r u + c`` and ``norm = g y`` (see `QuantizedACH`)."""

    def __init__(self, norm: DySoft) -> None:
        super().__init__()
        self.alpha, self.weight, self.bias = (
            nn.Parameter(value.detach().clone()) for value in (norm.alpha, norm.weight, norm.bias)
        )

    def forward(self, products: Tensor) -> Tensor:
        _, share, shift = fold_parameters(self.alpha, self.weight, self.bias)
        return _softsign(self.alpha.abs() * products) * share + shift

    def on_products(self, products: Tensor, scale: float) -> Tensor:
        """The same for exact products of codes `(B, E, H, W)` of scale `scale`, in float32."""
        _, share, shift = fold_parameters(self.alpha, self.weight, self.bias)
        factor = (self.alpha.abs().double() * scale * scale).float()
        return _softsign(factor * products.float()) * share + shift

    def gain(self) -> Tensor:
        return fold_parameters(self.alpha, self.weight, self.bias)[0]

    def bounds(self) -> tuple[Tensor, Tensor] | None:
        """The interval that every slot's values lie in, whatever the input."""
        _, share, shift = fold_parameters(self.alpha, self.weight, self.bias)
        return (shift - share).min().clamp_max(0), (shift + share).max().clamp_min(0)


class _AffineSlots(nn.Module):
    """A BatchNorm behind the products with its gain taken out: ``y = k q + h`` and ``norm = g y`` per slot.

    Its range has to be measured.
    """

    taken: Tensor

    def __init__(self, norm: nn.Module, cs: int) -> None:
        super().__init__()
        assert isinstance(norm, nn.BatchNorm2d)
        scale, shift = _affine_of(norm)
        gain, _ = choose_gain(scale, norm.weight.detach(), norm.bias.detach(), cs)
        shape = (1, -1, 1, 1)
        self.scale, self.shift = (nn.Parameter((value / gain).reshape(shape)) for value in (scale, shift))
        self.register_buffer("taken", gain.reshape(shape))

    def forward(self, products: Tensor) -> Tensor:
        return products * self.scale + self.shift

    def on_products(self, products: Tensor, scale: float) -> Tensor:
        """The same for exact products of codes `(B, E, H, W)` of scale `scale`, in float32."""
        factor = (self.scale.double() * scale * scale).float()
        return products.float() * factor + self.shift

    def gain(self) -> Tensor:
        return self.taken

    def bounds(self) -> tuple[Tensor, Tensor] | None:
        return None


def _softsign(t: Tensor) -> Tensor:
    return t / (t.abs() + 1.0)


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return the weight and bias of `conv` with `norm` folded into them."""
    scale, shift = _affine_of(norm)
    assert conv.bias is not None
    return (conv.weight * scale.reshape(-1, 1, 1, 1)).detach(), (conv.bias * scale + shift).detach()


def _affine_of(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return affine(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)


def _grid(quantizer: ActivationFakeQuantize) -> Grid:
    scale, zero_point = quantizer.calculate_qparams()
    return Grid(float(scale), int(zero_point))
