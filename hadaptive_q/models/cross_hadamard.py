"""The cross-Hadamard product: all pairwise products of a few channels, with a gradient that needs no scatter.

Formula: ``Q_p = Z_i * Z_j`` for ``i < j``, row-major. Gradient: ``dZ_k = sum over the pairs p that hold k of
dQ_p * Z_(the other one)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def pair_indices(cs: int) -> tuple[Tensor, Tensor]:
    """Return the operands `(i, j)` of every product slot, each `(E,)`, row-major with `i < j`."""
    i, j = torch.triu_indices(cs, cs, offset=1)
    return i.clone(), j.clone()  # rows of one tensor otherwise, which checkpoints refuse to share


class CrossHadamard(torch.autograd.Function):
    """The training form: `(B, Cs, H, W) -> (B, Cs (Cs - 1) / 2, H, W)`.

    Row i of the pairs is one broadcast product of neighbouring channels, so both directions read and write
    contiguous slices; the gradient of the indexed form is a scatter-add, which costs more than all the products.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        cs = z.shape[1]
        q = z.new_empty((z.shape[0], cs * (cs - 1) // 2, *z.shape[2:]))
        start = 0
        for i in range(cs - 1):
            stop = start + cs - 1 - i
            torch.mul(z[:, i : i + 1], z[:, i + 1 :], out=q[:, start:stop])
            start = stop
        return q

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        cs = z.shape[1]
        out = torch.zeros_like(z)
        start = 0
        for i in range(cs - 1):
            stop = start + cs - 1 - i
            row = gradient[:, start:stop]
            out[:, i] += (row * z[:, i + 1 :]).sum(dim=1)
            out[:, i + 1 :].addcmul_(row, z[:, i : i + 1])
            start = stop
        return out
