"""Which part of an image becomes the network's square: the middle, or in training a random part."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

Box = tuple[float, float, float, float]
_TRIES = 10
_LOG_RATIO = math.log(4 / 3)


class Crop(Protocol):
    """A part of an image of any size; with `quick` it may come from a decoder that leaves out fine detail."""

    @property
    def quick(self) -> bool: ...

    def box(self, width: int, height: int) -> Box:
        """Return left, top, right and bottom in pixels, within the image."""
        ...


@dataclass(frozen=True)
class CentralCrop:
    """The square in the middle whose side is `share` of the image's shorter side."""

    share: float = 1.0
    quick: bool = False

    def box(self, width: int, height: int) -> Box:
        side = self.share * min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return left, top, min(left + side, width), min(top + side, height)


@dataclass(frozen=True)
class RandomCrop:
    """A part with at least `least_area` of the image's area, 3:4 to 4:3, of which it becomes a square.

    Source: Szegedy et al., arXiv 1409.4842, section 6.
    """

    least_area: float
    generator: np.random.Generator
    quick: bool = True

    def box(self, width: int, height: int) -> Box:
        for _ in range(_TRIES):
            area = width * height * self.generator.uniform(self.least_area, 1)
            ratio = math.exp(self.generator.uniform(-_LOG_RATIO, _LOG_RATIO))
            wide, high = math.sqrt(area * ratio), math.sqrt(area / ratio)
            if wide <= width and high <= height:
                left, top = self.generator.uniform(0, width - wide), self.generator.uniform(0, height - high)
                return left, top, min(left + wide, width), min(top + high, height)
        return CentralCrop().box(width, height)  # of an image too narrow for any
