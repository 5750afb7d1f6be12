"""Ranges of a product's operands and of its norm's output, chosen together for the error of what the next layer reads.

Objective: with X~ the mixed features, Z its chosen channels, N the norm of their products, and ``Q_r`` quantization in
the range `r`, both expectations over the calibration samples,

``J(r, s) = E |Q_s(N(Q_r(Z))) - N(Z)|^2 / E |N(Z)|^2  +  E |Q_r(X~) - X~|^2 / E |X~|^2``

is least in `r`, the range of X~, and `s`, the range of N. Each range by itself cannot know what an operand's error
does behind the norm: clipping hurts where the norm is linear, and hardly where DySoft has saturated. X~ counts by
itself, too, as the depthwise convolution reads it. The first term is taken over a sample of pixels, the second over
all values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hadaptive_q.quant.observers import Range, Weighted, quantize, search_range

PIXELS = 4096
ALTERNATIONS = 2


class PixelSampler:
    """Keep `count` pixels drawn evenly from all batches without replacement, in bounded memory.

    Every pixel gets a random key and those with the smallest keys stay, so neither the number of batches nor of
    pixels need be known before.
    """

    def __init__(self, count: int = PIXELS) -> None:
        self.count = count
        self.generator = torch.Generator().manual_seed(0)
        self.keys = torch.empty(0)
        self.pixels: Tensor | None = None

    @torch.no_grad()
    def add(self, chosen: Tensor) -> None:
        """Draw from the pixels of `chosen` `(B, Cs, H, W)`."""
        pixels = chosen.detach().permute(0, 2, 3, 1).flatten(0, 2)
        keys = torch.rand(len(pixels), generator=self.generator)
        first = keys.argsort()[: self.count]
        keys, pixels = keys[first], pixels[first.to(pixels.device)]
        if self.pixels is not None:
            keys, pixels = torch.cat((self.keys, keys)), torch.cat((self.pixels, pixels))
            first = keys.argsort()[: self.count]
            keys, pixels = keys[first], pixels[first.to(pixels.device)]
        self.keys, self.pixels = keys, pixels

    def chosen(self) -> Tensor:
        """Return the kept pixels as `(1, Cs, 1, P)`. Raises ValueError where none was added."""
        if self.pixels is None:
            raise ValueError("no pixel was added")
        return self.pixels.T[None, :, None].contiguous()


@dataclass(frozen=True)
class Objective:
    """`mixed` is X~, `chosen` Z `(1, Cs, 1, P)`; `norm` maps Z to N `(1, E, 1, P)`."""

    mixed: Weighted
    chosen: Tensor
    norm: Callable[[Tensor], Tensor]
    levels: int

    def normed(self, mixed: Range) -> Tensor:
        """Return N of the chosen channels in the codes of the range `mixed`."""
        return self.norm(quantize(self.chosen, *mixed, self.levels))

    def of_mixed(self, mixed: Range) -> Tensor:
        """Return the second term."""
        return self.mixed.error(*mixed, self.levels) / self.mixed.power()


def relative_error(wanted: Tensor, found: Tensor) -> Tensor:
    """Return ``|found - wanted|^2 / |wanted|^2``."""
    return (found - wanted).square().sum() / wanted.square().sum().clamp_min(torch.finfo(torch.float32).tiny)


@torch.no_grad()
def find_ranges(objective: Objective, limits: tuple[Range, Range], start: tuple[Range, Range]) -> tuple[Range, Range]:
    """Return the ranges of X~ and of N, each within its `limits`, that make `objective` least.

    Alternates between both from `start`; each search moves both ends of its range.
    """
    (mixed_limits, normed_limits), (mixed, normed), levels = limits, start, objective.levels
    wanted = objective.norm(objective.chosen)
    for _ in range(ALTERNATIONS):

        def of_mixed(low: Tensor, high: Tensor, other: Range = normed) -> Tensor:
            stored = quantize(objective.normed((low, high)), *other, levels)
            return relative_error(wanted, stored) + objective.of_mixed((low, high))

        mixed = search_range(of_mixed, mixed_limits, mixed)
        computed = objective.normed(mixed)

        def of_normed(low: Tensor, high: Tensor, computed: Tensor = computed) -> Tensor:
            return relative_error(wanted, quantize(computed, low, high, levels))

        normed = search_range(of_normed, normed_limits, normed)
    return mixed, normed
