"""A histogram of all values a tensor took, in bounded memory and one pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BINS = 1 << 13


class Histogram:
    """Count values in `BINS` equal bins over ``[-2^k, 2^k]``; `k` grows with the values.

    Doubling the range merges neighbouring bins in pairs, so no count is ever split between two bins and the result
    does not depend on the order of the batches. At least a quarter of the bins cover values of one sign: eight a
    step of an int8 range at the worst, sixteen where both signs occur.
    """

    def __init__(self) -> None:
        self.exponent: int | None = None
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Count the finite values of `x`."""
        largest = float(x.abs().max())
        exponent = math.frexp(largest)[1] if largest > 0 else None
        if exponent is not None:
            self._widen(exponent)
        end = 1.0 if self.exponent is None else 2.0**self.exponent
        # Powers of two multiply exactly, so a value's bin does not depend on how wide the range is by now.
        bins = (x.detach().float().flatten() * (BINS / 2 / end)).floor_().long() + BINS // 2
        self.counts += torch.bincount(bins, minlength=BINS).double().cpu()

    def values(self) -> tuple[Tensor, Tensor]:
        """Return the centres of the bins that hold anything, and how much they hold."""
        end = 1.0 if self.exponent is None else 2.0**self.exponent
        centres = (torch.arange(BINS, dtype=torch.float64) + 0.5) * (2 * end / BINS) - end
        held = self.counts > 0
        return centres[held].float(), self.counts[held].float()

    def _widen(self, exponent: int) -> None:
        """Make the range reach ``2^exponent``; what was zero so far lies in the middle of any range."""
        if self.exponent is None:
            self.exponent = exponent
        for _ in range(self.exponent, exponent):
            inner = self.counts.reshape(BINS // 2, 2).sum(dim=1)
            self.counts = torch.nn.functional.pad(inner, (BINS // 4, BINS // 4))
            self.exponent += 1
