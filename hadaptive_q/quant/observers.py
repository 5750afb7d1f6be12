"""Range observers: from the values of a tensor to the interval its codes cover."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from hadaptive_q.quant.formats import SMALLEST_SCALE
from hadaptive_q.quant.histogram import Histogram

ObserverName = Literal["minmax", "mse", "histogram", "product"]
RangeName = Literal["minmax", "mse", "histogram"]
Range = tuple[Tensor, Tensor]
SAMPLES_PER_BATCH = 16384
COARSE = FINE = 20
SMALLEST_SHARE = 0.1
ROUNDS = 2


class RangeObserver(nn.Module):
    """Watch batches of a tensor and propose `(low, high)`, which always contains 0.

    "minmax" covers everything seen. "mse" and "histogram" clip where that lowers the mean squared error of
    quantization, over a sample of the values or over a histogram of them all. Values below `floor` count as `floor`.
    """

    low: Tensor
    high: Tensor

    def __init__(self, name: RangeName, levels: int, floor: float = -math.inf) -> None:
        super().__init__()
        self.name, self.levels, self.floor = name, levels, floor
        self.register_buffer("low", torch.tensor(0.0))
        self.register_buffer("high", torch.tensor(0.0))
        self.samples: list[Tensor] = []
        self.histogram = Histogram()

    @torch.no_grad()
    def watch(self, x: Tensor) -> None:
        """Take the values of `x` into account. Raises FloatingPointError for NaN or infinity."""
        low, high = x.aminmax()
        if not (low.isfinite() and high.isfinite()):
            raise FloatingPointError("NaN or infinity")
        x = x.clamp_min(self.floor)
        self.low.copy_(torch.minimum(self.low, low.clamp_min(self.floor)))
        self.high.copy_(torch.maximum(self.high, high))
        if self.name == "histogram":
            self.histogram.add(x)
        elif self.name == "mse":
            flat = x.detach().reshape(-1)
            # Drawn, not strided: a stride that divides the image's width would see one column only.
            generator = torch.Generator().manual_seed(len(self.samples))
            drawn = torch.randint(flat.numel(), (SAMPLES_PER_BATCH,), generator=generator)
            self.samples.append(flat[drawn.to(flat.device)])

    def limits(self) -> Range:
        """Return the interval of everything seen."""
        return self.low, self.high

    def values(self) -> Weighted:
        """Return what is known of the values: all of them in a histogram, or a sample."""
        if self.name == "histogram":
            values, counts = (t.to(self.low.device) for t in self.histogram.values())
        else:
            values = torch.cat(self.samples)
            counts = torch.ones_like(values)
        return Weighted(values, counts)

    @torch.no_grad()
    def range(self) -> Range:
        """Return the interval to quantize. Forgets the values."""
        if self.name == "minmax" or self.high == self.low:
            return self.limits()
        found = best_range(self.values(), self.limits(), self.levels)
        self.samples, self.histogram = [], Histogram()
        return found


@dataclass(frozen=True)
class Weighted:
    """Values `(N,)` and how often each occurred."""

    values: Tensor
    counts: Tensor

    def error(self, low: Tensor, high: Tensor, levels: int) -> Tensor:
        """Return the summed squared error of quantization in (low, high)."""
        return (quantize(self.values, low, high, levels) - self.values).square().mul_(self.counts).sum()

    def power(self) -> Tensor:
        """Return the summed squares; never 0."""
        return (self.values.square() * self.counts).sum().clamp_min(torch.finfo(torch.float32).tiny)


def best_range(values: Weighted, limits: Range, levels: int) -> Range:
    """Return the range within `limits` of least squared error for `values`.

    Both ends move twice: the best end on one side depends on where the other one is.
    """
    found = limits
    for _ in range(ROUNDS):
        found = search_range(lambda low, high: values.error(low, high, levels), limits, found)
    return found


def quantize(x: Tensor, low: Tensor, high: Tensor, levels: int) -> Tensor:
    """Return `x` in codes over (low, high) and back, as the fake-quantizer of that range gives it."""
    scale = ((high - low) / (levels - 1)).clamp_min(SMALLEST_SCALE)
    bottom = (low / scale).round()
    return (x / scale).round_().clamp_(bottom, bottom + levels - 1).mul_(scale)


def search_range(error: Callable[[Tensor, Tensor], Tensor], limits: Range, start: Range) -> Range:
    """Return `start` with its high and then its low end moved to where ``error(low, high)`` is least.

    An end takes a coarse and then a fine grid of shares of its limit.
    """
    low, high = limits
    best_low = start[0]
    best_high = high * _best_share(lambda share: error(best_low, high * share))
    return low * _best_share(lambda share: error(low * share, best_high)), best_high


def _best_share(error: Callable[[float], Tensor]) -> float:
    step = (1 - SMALLEST_SHARE) / COARSE
    coarse = _least(error, [1 - step * n for n in range(COARSE + 1)])
    fine = [coarse + 2 * step * (n / FINE - 0.5) for n in range(FINE + 1)]
    return _least(error, [share for share in fine if SMALLEST_SHARE <= share <= 1])


def _least(error: Callable[[float], Tensor], shares: list[float]) -> float:
    errors = [float(error(share)) for share in shares]
    return shares[errors.index(min(errors))]
