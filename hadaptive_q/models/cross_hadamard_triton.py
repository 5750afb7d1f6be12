"""The cross-Hadamard product and its gradient on CUDA, in Triton.

Neither direction needs atomics: one program writes all products of a channel with those behind it, one sums all pairs
that a channel is in. Sums are in float32, or float64 for tensors of that.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256


def products(z: Tensor, out: Tensor) -> Tensor:
    """Fill the contiguous `out` `(B, Cs (Cs - 1) / 2, H, W)` with the products of `z` `(B, Cs, H, W)`; return it."""
    cs, pixels = z.shape[1], z.shape[2] * z.shape[3]
    grid = (len(z), cs - 1, triton.cdiv(pixels, BLOCK))
    _products[grid](z.contiguous(), out, cs, pixels, BLOCK)
    return out


def gradient(incoming: Tensor, z: Tensor, out: Tensor) -> Tensor:
    """Fill the contiguous `out`, shaped as `z`, with the gradient for `z`, given that of the products; return it."""
    cs, pixels = z.shape[1], z.shape[2] * z.shape[3]
    grid = (len(z), cs, triton.cdiv(pixels, BLOCK))
    _gradient[grid](incoming.contiguous(), z.contiguous(), out, cs, pixels, BLOCK)
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _products(z, out, cs: tl.constexpr, pixels, block: tl.constexpr):  # type: ignore[no-untyped-def]
    image, i = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pixel = tl.program_id(2) * block + tl.arange(0, block)
    inside = pixel < pixels
    wide: tl.constexpr = tl.float64 if z.dtype.element_ty == tl.float64 else tl.float32
    channels = z + image * cs * pixels
    slots = out + (image * (cs * (cs - 1) // 2) + i * (2 * cs - i - 1) // 2) * pixels
    own = tl.load(channels + i * pixels + pixel, mask=inside).to(wide)
    for j in range(cs):
        behind = inside & (j > i)
        other = tl.load(channels + j * pixels + pixel, mask=behind).to(wide)
        tl.store(slots + (j - i - 1) * pixels + pixel, (own * other).to(out.dtype.element_ty), mask=behind)


@triton.jit  # type: ignore[untyped-decorator]
def _gradient(incoming, z, out, cs: tl.constexpr, pixels, block: tl.constexpr):  # type: ignore[no-untyped-def]
    image, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pixel = tl.program_id(2) * block + tl.arange(0, block)
    inside = pixel < pixels
    wide: tl.constexpr = tl.float64 if z.dtype.element_ty == tl.float64 else tl.float32
    channels = z + image * cs * pixels
    slots = incoming + image * (cs * (cs - 1) // 2) * pixels
    total = tl.zeros([block], dtype=wide)
    for m in range(cs):
        i, j = tl.minimum(m, k), tl.maximum(m, k)
        slot = i * (2 * cs - i - 1) // 2 + j - i - 1
        paired = inside & (m != k)
        other = tl.load(channels + m * pixels + pixel, mask=paired, other=0.0).to(wide)
        total += other * tl.load(slots + slot * pixels + pixel, mask=paired, other=0.0).to(wide)
    tl.store(out + image * cs * pixels + k * pixels + pixel, total.to(out.dtype.element_ty), mask=inside)
