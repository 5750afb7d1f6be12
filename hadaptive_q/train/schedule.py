"""Learning rate and Gumbel noise as functions of the step."""

from __future__ import annotations

import math


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Return the factor on the peak learning rate: linear warm-up over the share `warmup`, then cosine to 0.

    Formula: ``(t + 1) / w`` for ``t < w``, else ``(1 + cos(pi (t - w) / (T - w))) / 2``, `w = warmup * T`.
    """
    rise = round(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def noise_factor(step: int, steps: int, until: float) -> float:
    """Return the factor on ACH's Gumbel noise: linear from 1 to 0 over the share `until` of the steps, then 0.

    With the published constant noise (std 1.28 against a score spread of 0.2) training selects almost at random
    and meets the selection of inference for the first time at inference; annealing closes that gap.
    `until = 0` is no noise at all.
    """
    end = until * steps
    return max(0.0, 1 - step / end) if end else 0.0


def weight_bits(epoch: int, until: float, lowest: int) -> int:
    """Return how many bits weights have in `epoch`: 8 in the first, a bit fewer at a time, `lowest` from `until` on."""
    left = max(0.0, 1 - epoch / until) if until else 0.0
    return lowest + math.ceil((8 - lowest) * left)
