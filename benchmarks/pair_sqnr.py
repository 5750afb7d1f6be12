"""SQNR behind DySoft of a product of two standard normals, stored in 8 bits or not."""

from __future__ import annotations

import torch
from torch import Tensor

from hadaptive_q.lower.parity import sqnr_db
from hadaptive_q.quant.observers import Weighted, best_range, quantize

SAMPLES, LEVELS, SLOPE = 1 << 18, 256, 0.5


def product_sqnr_db() -> dict[str, float]:
    """Return the SQNR of ``u(a z_i z_j)`` with operands and result in 8 bits, each in its best range."""
    left, right = torch.randn(2, SAMPLES, generator=torch.Generator().manual_seed(0))
    wanted = _softsign(left * right)
    product = _in_8_bits(left) * _in_8_bits(right)
    return {
        "float product": sqnr_db(wanted, _in_8_bits(_softsign(product))),
        "int8 product": sqnr_db(wanted, _in_8_bits(_softsign(_in_8_bits(product)))),
    }


def _softsign(product: Tensor) -> Tensor:
    slope = SLOPE * product
    return slope / (1 + slope.abs())


def _in_8_bits(x: Tensor) -> Tensor:
    limits = x.min(), x.max()
    return quantize(x, *best_range(Weighted(x, torch.ones_like(x)), limits, LEVELS), LEVELS)
