"""Paired comparison of two networks on the same images: the interval of a drop, and how many images decide it.

The interval inverts McNemar's score test (Tango, Statistics in Medicine 17, 1998): where only a few images differ, or
none, it stays honest, which the usual ``+- 1.96 standard errors`` does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from scipy.optimize import brentq

CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
MOST_IMAGES = 10**7


@dataclass(frozen=True)
class Drop:
    """What `samples` images lose between two networks: `lost` only the first has right, `won` only the second."""

    lost: float
    won: float
    samples: float

    @property
    def points(self) -> float:
        """The drop in points, ``100 (lost - won) / samples``."""
        return 100 * (self.lost - self.won) / self.samples

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of `points`."""
        observed = self.points / 100
        low, high = (self._end(observed, end) for end in (-1.0, 1.0))
        return 100 * low, 100 * high

    def _end(self, observed: float, furthest: float) -> float:
        # Right beside the observed drop: where no image differs, the drop itself is a root, and not the one wanted.
        beside = observed + math.copysign(1e-12, furthest)
        return furthest if abs(beside) >= 1 else float(brentq(self._distance, beside, furthest))

    def _distance(self, drop: float) -> float:
        """Return by how much ``T(drop)^2`` exceeds what chance makes of a true `drop` (in shares, not points)."""
        n, difference = self.samples, self.lost - self.won
        b = (2 * n - difference) * drop - self.lost - self.won
        won = (math.sqrt(max(0.0, b * b + 8 * n * self.won * drop * (1 - drop))) - b) / (4 * n)
        return (difference - n * drop) ** 2 - _Z**2 * n * (2 * won + drop * (1 - drop))


def needed_samples(drop: Drop, limit: float) -> int | None:
    """Return how many images, with as many lost and won among them, would tell `drop` from `limit` points.

    None where more than `MOST_IMAGES` would be needed.
    """

    def decides(samples: int) -> bool:
        share = samples / drop.samples
        low, high = Drop(drop.lost * share, drop.won * share, samples).interval
        return high <= limit or low > limit

    enough = math.ceil(drop.samples)
    while not decides(enough):
        enough *= 2
        if enough > MOST_IMAGES:
            return None
    least = enough // 2
    while enough - least > max(1, enough // 100):  # two digits say it
        middle = (least + enough) // 2
        least, enough = (least, middle) if decides(middle) else (middle, enough)
    return enough
