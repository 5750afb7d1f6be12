"""The knapsack against every possible choice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hadaptive_q.quant.assignment import choose


def cheapest(saved: list[int], noises: list[float], needed: int) -> float:
    """Return the least sum of noises by trying every choice."""
    every = itertools.product([False, True], repeat=len(saved))
    sums = [(sum(itertools.compress(saved, taken)), sum(itertools.compress(noises, taken))) for taken in every]
    return min(noise for size, noise in sums if size >= needed)


@pytest.mark.parametrize("seed", range(30))
def test_against_every_choice(seed: int) -> None:
    generator = np.random.default_rng(seed)
    count = int(generator.integers(1, 11))
    saved = [int(size) for size in generator.integers(1, 500_000, count)]
    # As far apart as layers are: the solver must not take a noise of 1e-9 for none.
    noises = [float(noise) for noise in 10 ** generator.uniform(-9, -2, count)]
    needed = int(generator.integers(1, sum(saved) + 1))
    taken = choose(saved, noises, needed)
    assert taken is not None
    assert sum(itertools.compress(saved, taken)) >= needed
    assert sum(itertools.compress(noises, taken)) == pytest.approx(cheapest(saved, noises, needed), rel=1e-9)


def test_the_best_ratio_is_not_always_best() -> None:
    """One layer that spares enough beats the two cheapest per byte."""
    assert choose([60, 50, 100], [0.5, 0.45, 0.9], 100) == [False, False, True]


def test_the_ends() -> None:
    assert choose([8, 4], [1.0, 2.0], 0) == [False, False]
    assert choose([8, 4], [1.0, 2.0], 12) == [True, True]
    assert choose([8, 4], [1.0, 2.0], 13) is None
    assert choose([8, 4], [0.0, 0.0], 9) == [True, True]
    assert choose([], [], 1) is None
