"""Range observers: from the values of a tensor to the interval its codes cover."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

ObserverName = Literal["minmax", "mse"]
SAMPLES_PER_BATCH = 4096
SHRINKS = 40
SMALLEST_SHARE = 0.3


class RangeObserver(nn.Module):
    """Watch batches of a tensor and propose `(low, high)`, which always contains 0.

    "minmax" covers everything seen. "mse" clips where that lowers the mean squared error of quantization over
    a sample of the values: both ends shrink through a grid of shares, each on its own.
    """

    low: Tensor
    high: Tensor

    def __init__(self, name: ObserverName, levels: int) -> None:
        super().__init__()
        self.name, self.levels = name, levels
        self.register_buffer("low", torch.tensor(0.0))
        self.register_buffer("high", torch.tensor(0.0))
        self.samples: list[Tensor] = []

    @torch.no_grad()
    def watch(self, x: Tensor) -> None:
        """Take the values of `x` into account. Raises FloatingPointError for NaN or infinity."""
        low, high = x.aminmax()
        if not (low.isfinite() and high.isfinite()):
            raise FloatingPointError("NaN or infinity")
        self.low.copy_(torch.minimum(self.low, low))
        self.high.copy_(torch.maximum(self.high, high))
        if self.name == "mse":
            flat = x.detach().reshape(-1)
            # Drawn, not strided: a stride that divides the image's width would see one column only.
            generator = torch.Generator().manual_seed(len(self.samples))
            drawn = torch.randint(flat.numel(), (SAMPLES_PER_BATCH,), generator=generator)
            self.samples.append(flat[drawn.to(flat.device)])

    @torch.no_grad()
    def range(self) -> tuple[Tensor, Tensor]:
        """Return the interval to quantize and forget the sample."""
        if self.name == "minmax" or not self.samples or self.high == self.low:
            return self.low, self.high
        values = torch.cat(self.samples)
        self.samples = []
        low, high = self.low, self.high
        # Alternate twice: the best end on one side depends on where the other one is.
        for _ in range(2):
            high = self._best(values, low.expand(SHRINKS), self._grid() * self.high)[1]
            low = self._best(values, self._grid() * self.low, high.expand(SHRINKS))[0]
        return low, high

    def _grid(self) -> Tensor:
        return torch.linspace(1.0, SMALLEST_SHARE, SHRINKS, device=self.low.device)

    def _best(self, values: Tensor, lows: Tensor, highs: Tensor) -> tuple[Tensor, Tensor]:
        scale = ((highs - lows) / (self.levels - 1)).clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        bottom = (lows[:, None] / scale).round()
        codes = (values / scale).round().clamp(bottom, bottom + self.levels - 1)
        best = (codes * scale - values).square().mean(dim=1).argmin()
        return lows[best], highs[best]
