"""The float32 operators whose order of roundings can reach a code: as the ExecuTorch/XNNPACK runtime computes them.

Element-wise operators (add, mul, div, abs, clamp) round once in any IEEE 754 arithmetic and need no definition. Sums
and fused multiply-adds do. Written here is the order of the kernels with fused multiply-add (x86-64 with FMA3 or
AVX-512, ARM64); those for older x86-64 round otherwise.
Source: XNNPACK 1adaa7c (src/f32-rdsum, src/f32-dwconv, src/f32-vhswish), restated.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# float32(1 / 6), as the kernel has it.
SIXTH = float.fromhex("0x1.555556p-3")


def fused_multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return ``a * b + c`` of float32 tensors, rounded once.

    By way of float64, where the product (48 bits) is exact: the sum rounds to 53 bits and then to 24, which differs
    from one rounding in about one case in 2^29.
    """
    return (a.double() * b.double() + c.double()).float()


def mean_hw(x: Tensor) -> Tensor:
    """Return the mean over H and W, `(B, C, H, W) -> (B, C, 1, 1)`.

    Formula: ``(((x_00 + x_01) + x_02) + ...) * (1 / (H W))``, row by row.
    """
    pixels = x.flatten(2).unbind(dim=2)
    total = pixels[0]
    for pixel in pixels[1:]:
        total = total + pixel
    return (total * torch.tensor(1.0 / len(pixels), dtype=torch.float32))[:, :, None, None]


def conv1d(x: Tensor, weight: Tensor, padding: int) -> Tensor:
    """Convolve `(B, 1, C)` with one filter `(1, 1, K)`: a fused multiply-add per tap, from the first tap on."""
    windows = F.pad(x, (padding, padding)).unfold(2, weight.shape[2], 1)
    total = torch.zeros_like(windows[..., 0])
    for tap in range(weight.shape[2]):
        total = fused_multiply_add(windows[..., tap], weight[0, 0, tap], total)
    return total


def hardswish(x: Tensor) -> Tensor:
    """Return ``x * clamp(x / 6 + 1/2, 0, 1)``, the inner sum fused. (As a table of codes it has another order.)"""
    sixth, half = (torch.tensor(value, dtype=torch.float32) for value in (SIXTH, 0.5))
    return fused_multiply_add(x, sixth, half).clamp(0.0, 1.0) * x
