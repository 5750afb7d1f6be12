"""Which layers get 4 bits: the least noise for the bytes that must go, exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

# The solver stops at an absolute gap of 1e-6: noises of 1e-5 would all be equal to it.
LARGEST_COST = 1e6


def choose(saved: Sequence[int], noises: Sequence[float], needed: int) -> list[bool] | None:
    """Return which items to take: those of least summed noise that save `needed` bytes or more; None where all do not.

    A 0/1 knapsack: minimise ``sum x_i noises_i`` subject to ``sum x_i saved_i >= needed``, by branch and bound.
    """
    if needed <= 0:
        return [False] * len(saved)
    if sum(saved) < needed:
        return None
    costs = np.asarray(noises, dtype=np.float64)
    largest = float(costs.max())
    found = milp(
        costs * (LARGEST_COST / largest if largest else 0.0),
        constraints=LinearConstraint(np.asarray(saved, dtype=np.float64)[None], lb=needed),
        bounds=Bounds(0, 1),
        integrality=np.ones(len(saved)),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise RuntimeError(f"no assignment of {len(saved)} layers: {found.message}")
    taken = [bool(x > 0.5) for x in found.x]
    if sum(s for s, t in zip(saved, taken, strict=True) if t) < needed:
        raise RuntimeError(f"the assignment saves less than the {needed} bytes asked for")
    return taken
