"""The integer arithmetic of the ExecuTorch/XNNPACK runtime, operator by operator, on tensors of codes.

Every function here is a definition: what a written file computes, rounding by rounding. Codes are int8 tensors of any
batch size, on the CPU; scales are float32 values, held as Python floats. Sums run in floating point, where integers are
exact as long as every partial sum stays below 2^24 (float32) or 2^53 (float64); `exact_dtype` proves which one serves.

Source: XNNPACK 1adaa7c (src/microparams-init.c, src/operators/convolution-nhwc.c, src/operators/reduce-nd.c,
src/reference/unary-elementwise.cc, src/qs8-rdsum, src/qs8-vadd, src/qs8-vmul, src/qs8-qc8w-gemm, src/f32-qs8-vcvt,
src/qs8-f32-vcvt), restated; checked against files run in the stock runtime of executorch 1.5.1 on x86-64 and on
emulated Cortex-A53 and A76.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOWEST, HIGHEST = -128, 127
# |code - zero point|, both in 8 bits.
LARGEST_OFFSET = HIGHEST - LOWEST
MULTIPLIER_BITS = 20
# XNNPACK states the ratio of an addition's scales may lie in [2^-10, 2^8) and checks it in debug builds only.
SMALLEST_RATIO, LARGEST_RATIO = 2.0**-10, 2.0**8
# The same for a multiplication, whose ratio is that of the product of both scales.
SMALLEST_PRODUCT_RATIO = 2.0**-16


class Grid(NamedTuple):
    """The affine grid of a tensor: ``x = (code - zero_point) * scale`` for codes in [-128, 127]."""

    scale: float
    zero_point: int


class Taps(NamedTuple):
    """How a convolution steps over its input; pairs are (vertical, horizontal)."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


def quantize(x: Tensor, grid: Grid) -> Tensor:
    """Return the codes of float32 `x`: ``clamp(round(x * (1 / s)) + z, -128, 127)``.

    The reciprocal and the product each round once in float32; `round` is half to even.
    """
    inverse = 1.0 / _float32(grid.scale)
    return _saturate((x * inverse).round() + grid.zero_point)


def dequantize(codes: Tensor, grid: Grid) -> Tensor:
    """Return ``(q - z) * s`` in float32: 9-bit differences, one rounding."""
    return (codes.to(torch.float32) - grid.zero_point) * _float32(grid.scale)


def multiplier(input_scale: float, weight_scale: Tensor, output_scale: float) -> Tensor:
    """Return the rescale factors `(C,)` of a layer: ``(s_x * s_w) / s_y`` in float32, rounded after each operator."""
    return _float32(input_scale) * weight_scale.to(torch.float32) / _float32(output_scale)


def quantize_bias(bias: Tensor, input_scale: float, weight_scale: Tensor) -> Tensor:
    """Return the int32 bias `(C,)` that lowering writes: ``round(b * (1 / (s_w * s_x)))``, all in float32."""
    step = weight_scale.to(torch.float32) * _float32(input_scale)
    return (bias.to(torch.float32) * (1.0 / step)).round().to(torch.int32)


def exact_dtype(weight: Tensor) -> torch.dtype:
    """Return the floating-point type in which a layer's sums over `weight` `(C, ...)` are exact in any order.

    No partial sum exceeds ``255 * sum |w|`` of its channel; K products of 9-bit offsets and 8-bit weights need
    16 + ceil(log2 K) bits and a sign. Float32 takes 24, float64 takes 53.
    """
    largest = LARGEST_OFFSET * float(weight.to(torch.float64).abs().flatten(1).sum(dim=1).max())
    return torch.float32 if largest < 2**24 else torch.float64


def conv2d(
    codes: Tensor, weight: Tensor, bias: Tensor | None, zero_point: int, factor: Tensor, out: int, taps: Taps
) -> Tensor:
    """Convolve codes `(B, C, H, W)` with int8 weights; `factor` `(C',)` is `multiplier`'s, `out` the new zero point.

    Formula: ``acc = b + sum (q - z) w``, padding with ``q = z``; ``y = clamp(round(float32(acc) f) + z', -128, 127)``.
    Bits: q - z 9, w 8, acc 32 (see `exact_dtype`); float32(acc) rounds beyond 24 bits; one rounding of the product and
    one, half to even, to the code. Depthwise convolutions are the case ``groups = C``.
    """
    dtype = exact_dtype(weight)
    offsets = codes.to(dtype) - zero_point
    # NNPACK, where a build of torch prefers it, convolves by transforms that are exact for no integer.
    with torch.backends.nnpack.flags(enabled=False):
        acc = F.conv2d(offsets, weight.to(dtype), None, taps.stride, taps.padding, taps.dilation, taps.groups)
    return requantize(_add_bias(acc, bias), factor, out)


def linear(codes: Tensor, weight: Tensor, bias: Tensor | None, zero_point: int, factor: Tensor, out: int) -> Tensor:
    """Multiply codes `(B, K)` by int8 weights `(C, K)`; formula and bits are those of `conv2d`."""
    dtype = exact_dtype(weight)
    acc = F.linear(codes.to(dtype) - zero_point, weight.to(dtype))
    return requantize(_add_bias(acc, bias), factor, out)


def requantize(acc: Tensor, factor: Tensor, zero_point: int) -> Tensor:
    """Return ``clamp(round(float32(acc) * f) + z, -128, 127)`` of int32 `acc` `(B, C, ...)` and `f` `(C,)`."""
    scaled = acc.to(torch.float32) * factor.reshape(-1, *(1,) * (acc.dim() - 2))
    return _saturate(scaled.round() + zero_point)


def add(a: Tensor, b: Tensor, a_grid: Grid, b_grid: Grid, out: Grid) -> Tensor:
    """Add two tensors of codes in fixed point.

    Formula: ``r_a = s_a / s_y``, ``r_b = s_b / s_y`` in float32; ``h = 20 - floor(log2 max(r_a, r_b))``;
    ``m = round(r 2^h)``; ``y = clamp(((m_a (a - z_a) + m_b (b - z_b) + 2^(h-1)) >> h) + z_y, -128, 127)``.
    Bits: m at most 22, each product at most 30 and a sign, their sum with the rounding term 32; h lies in [12, 30]. The
    shift rounds half up, not to even. Raises ValueError for ratios the runtime does not promise anything about.
    """
    (a_factor, b_factor), shift = fixed_point(a_grid.scale, b_grid.scale, out.scale)
    acc = a_factor * (a.to(torch.int32) - a_grid.zero_point) + b_factor * (b.to(torch.int32) - b_grid.zero_point)
    return _saturate(((acc + (1 << (shift - 1))) >> shift) + out.zero_point)


def multiply(a: Tensor, b: Tensor, a_grid: Grid, b_grid: Grid, out: Grid) -> Tensor:
    """Multiply two tensors of codes element by element; a gate `(B, C, 1, 1)` broadcasts over pixels.

    Formula: ``f = (s_a s_b) / s_y`` in float32, rounded after each operator;
    ``y = clamp(round(float32((a - z_a) (b - z_b)) f) + z_y, -128, 127)``.
    Bits: offsets 9, their product 17, exact in float32; one rounding of the product with f and one, half to even, to
    the code: the kernels of x86-64. Raises ValueError for a ratio the runtime does not promise anything about.
    """
    factor, acc = _product(a, b, a_grid, b_grid, out)
    return _saturate((acc.to(torch.float32) * factor).round() + out.zero_point)


def multiply_arm64(a: Tensor, b: Tensor, a_grid: Grid, b_grid: Grid, out: Grid) -> Tensor:
    """Multiply as `multiply`, by the kernels of ARM64.

    Formula: ``f = m 2^(-31 - k)`` with an integer m of 31 bits; ``y = clamp((floor(p 2^l m / 2^31) + 2^(r - 1)) >> r)``
    with `p` the product of the offsets, ``r = max(k, 1)`` and ``l = r - k``: half up, after a first rounding down.
    Another code than `multiply` only where ``p f`` lies within 2^-14 of a half.
    """
    factor, acc = _product(a, b, a_grid, b_grid, out)
    bits = int(factor.view(torch.int32))
    mantissa = (bits & 0x7FFFFF | 0x800000) << 7
    shift = 126 - (bits >> 23)
    right = max(shift, 1)
    high = ((acc.to(torch.int64) << (right - shift)) * mantissa) >> 31
    return _saturate(((high + (1 << (right - 1))) >> right) + out.zero_point)


def _product(a: Tensor, b: Tensor, a_grid: Grid, b_grid: Grid, out: Grid) -> tuple[Tensor, Tensor]:
    """Return the ratio of the scales, float32, and the products of the offsets, int32."""
    factor = _float32(a_grid.scale) * _float32(b_grid.scale) / _float32(out.scale)
    if not SMALLEST_PRODUCT_RATIO <= float(factor) < LARGEST_RATIO:
        raise ValueError(f"the ratio of scales {float(factor)} lies outside [2^-16, 2^8)")
    return factor, (a.to(torch.int32) - a_grid.zero_point) * (b.to(torch.int32) - b_grid.zero_point)


def code_of(value: float, grid: Grid) -> int:
    """Return the code at which a clamp to `value`, which may be infinite, cuts off: ``rint(clamp(v / s + z))``."""
    return int((_float32(value) / _float32(grid.scale) + grid.zero_point).clamp(LOWEST, HIGHEST).round())


def fixed_point(a_scale: float, b_scale: float, out_scale: float) -> tuple[tuple[int, int], int]:
    """Return the integer factors of both operands of an addition and the shift they share (see `add`)."""
    ratios = [float(_float32(scale) / _float32(out_scale)) for scale in (a_scale, b_scale)]
    if min(ratios) < SMALLEST_RATIO or max(ratios) >= LARGEST_RATIO:
        raise ValueError(f"ratios of scales {ratios} lie outside [2^-10, 2^8)")
    shift = MULTIPLIER_BITS - (math.frexp(max(ratios))[1] - 1)
    a_factor, b_factor = (round(math.ldexp(ratio, shift)) for ratio in ratios)
    return (a_factor, b_factor), shift


def mean_hw(codes: Tensor, grid: Grid, out: Grid) -> Tensor:
    """Return the mean over H and W, `(B, C, H, W) -> (B, C, 1, 1)`.

    Formula, ``N = H W``: ``f = (s / s') * (1 / N)``; ``y = clamp(round(float32(sum q) f + (z' - N z f)), -128, 127)``.
    Bits: the sum 8 + log2 N; float32 operators, each rounded (no fused multiply-add); the code half to even.
    """
    count = codes.shape[2] * codes.shape[3]
    factor = _float32(grid.scale) / _float32(out.scale) * _float32(1.0 / count)
    shift = _float32(out.zero_point) - _float32(count * grid.zero_point) * factor
    total = codes.to(torch.int32).sum(dim=(2, 3), keepdim=True).to(torch.float32)
    return _saturate((total * factor + shift).round())


def table(function: Callable[[Tensor], Tensor], source: Grid, out: Grid) -> Tensor:
    """Return the 256 int8 results of an element-wise function, for codes -128 to 127 in that order.

    Formula: ``clamp(round(f((q - z) s) * (1 / s') + z'), -128, 127)`` in float32. Unlike `quantize`, the zero point is
    added before rounding: one more rounding, and ties that fall to the even code, not to the even multiple.
    """
    codes = torch.arange(LOWEST, HIGHEST + 1, dtype=torch.int8)
    values = function(dequantize(codes, source))
    return _saturate((values * (1.0 / _float32(out.scale)) + out.zero_point).round())


def lookup(codes: Tensor, entries: Tensor) -> Tensor:
    """Return ``entries[q + 128]``: 8 bits in, 8 bits out."""
    return entries[codes.to(torch.int32) - LOWEST]


def hardswish(x: Tensor) -> Tensor:
    """Return ``(x / 6) * clamp(x + 3, 0, 6)`` in float32, in the order in which tables of Hardswish are filled."""
    return (x / torch.full_like(x, 6.0)) * (x + 3.0).clamp(0.0, 6.0)


def gelu(x: Tensor) -> Tensor:
    """Return ``(x / 2) * (1 + erf(x sqrt(2) / 2))``, all but the first quotient in float64, as tables have it."""
    return ((x / 2).double() * (1 + torch.erf(x.double() * math.sqrt(2) / 2))).float()


def sigmoid(x: Tensor) -> Tensor:
    """Return ``e^x / (1 + e^x)``, computed in float64; beyond 100 it is 0 or 1."""
    power = x.double().clamp(-100, 100).exp()
    return (power / (1 + power)).float()


def clamp(codes: Tensor, low: int, high: int) -> Tensor:
    """Return codes of fewer bits than 8: ``min(max(q, low), high)``."""
    return codes.clamp(low, high)


def _add_bias(acc: Tensor, bias: Tensor | None) -> Tensor:
    acc = acc.to(torch.int32)
    return acc if bias is None else acc + bias.reshape(-1, *(1,) * (acc.dim() - 2))


def _saturate(values: Tensor) -> Tensor:
    return values.clamp(LOWEST, HIGHEST).to(torch.int8)


def _float32(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)
