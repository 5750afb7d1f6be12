"""The cross-Hadamard product: all pairwise products of a few channels, with a gradient that needs no scatter.

Formula: ``Q_p = Z_i * Z_j`` for ``i < j``, row-major. Gradient: ``dZ_k = sum over the pairs p that hold k of
dQ_p * Z_(the other one)``.

An operator of its own, so that compilers see one node with a known shape; it keeps nothing but `Z` for its gradient.
On the CPU row i of the pairs is one broadcast product of neighbouring channels, so both directions read and write
contiguous slices: the gradient of the indexed form is a scatter-add, which costs more than all the products. CUDA has
kernels of its own where Triton is installed.

Under autocast it takes and gives float32: products of two half-precision numbers are exact there and cannot overflow,
and the norm behind works in float32 in any case.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor


def pair_indices(cs: int) -> tuple[Tensor, Tensor]:
    """Return the operands `(i, j)` of every product slot, each `(E,)`, row-major with `i < j`."""
    i, j = torch.triu_indices(cs, cs, offset=1)
    return i.clone(), j.clone()  # rows of one tensor otherwise, which checkpoints refuse to share


@torch.library.custom_op("hadaptive_q::cross_hadamard", mutates_args=())
def cross_hadamard(z: Tensor) -> Tensor:
    """Return the products `(B, Cs (Cs - 1) / 2, H, W)` of channels `(B, Cs, H, W)`, for training."""
    cs = z.shape[1]
    q = _products_like(z)
    start = 0
    for i in range(cs - 1):
        stop = start + cs - 1 - i
        torch.mul(z[:, i : i + 1], z[:, i + 1 :], out=q[:, start:stop])
        start = stop
    return q


@torch.library.custom_op("hadaptive_q::cross_hadamard_gradient", mutates_args=())
def _gradient(gradient: Tensor, z: Tensor) -> Tensor:
    cs = z.shape[1]
    out = _zeros_like(z)
    start = 0
    for i in range(cs - 1):
        stop = start + cs - 1 - i
        row = gradient[:, start:stop]
        out[:, i] += (row * z[:, i + 1 :]).sum(dim=1)
        out[:, i + 1 :].addcmul_(row, z[:, i : i + 1])
        start = stop
    return out


def _products_like(z: Tensor) -> Tensor:
    return z.new_empty((z.shape[0], z.shape[1] * (z.shape[1] - 1) // 2, *z.shape[2:]))


def _zeros_like(z: Tensor) -> Tensor:
    return torch.zeros_like(z, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> Tensor:
    out: Tensor = _gradient(gradient, *ctx.saved_tensors)
    return out


cross_hadamard.register_fake(_products_like)
cross_hadamard.register_autograd(_backward, setup_context=_setup)
_gradient.register_fake(lambda gradient, z: _zeros_like(z))
for _device in ("cpu", "cuda"):
    cross_hadamard.register_autocast(_device, torch.float32)

if find_spec("triton"):

    @cross_hadamard.register_kernel("cuda")
    def _(z: Tensor) -> Tensor:
        from hadaptive_q.models import cross_hadamard_triton as kernels

        return kernels.products(z, _products_like(z))

    @_gradient.register_kernel("cuda")
    def _(gradient: Tensor, z: Tensor) -> Tensor:
        from hadaptive_q.models import cross_hadamard_triton as kernels

        return kernels.gradient(gradient, z, _zeros_like(z))
