"""Random numbers for the samples of a batch, the same however many processes share the batch.

Every process draws those of the whole batch from generators in the same state and takes the rows of its own samples.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hadaptive_q import processes


def exponential_like(x: Tensor) -> Tensor:
    """Return numbers of the standard exponential distribution, shaped as `x` `(B, ...)`."""
    return processes.own_rows(_whole(x).exponential_())


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Return `x` `(B, ...)` with each value 0 with probability `p`, the others divided by ``1 - p``, in training."""
    if not training:
        return x
    return x * processes.own_rows(torch.dropout(_whole(x).fill_(1.0), p, True))


class Dropout(nn.Dropout):
    """`dropout` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, True) if self.training else super().forward(x)


class StochasticDepth(nn.Module):
    """``x / (1 - p)``, or 0 with probability `p`, each sample `(B, ...)` for itself, in training; else x.

    Source: arXiv 1603.09382 ("Deep Networks with Stochastic Depth").
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        return x * dropout(x.new_ones(len(x), *(1,) * (x.dim() - 1)), self.p, True)


def _whole(x: Tensor) -> Tensor:
    return x.new_empty((processes.count() * len(x), *x.shape[1:]))
