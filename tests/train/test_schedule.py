from __future__ import annotations

import math

import pytest

from hadaptive_q.train.schedule import learning_rate_factor, noise_factor, weight_bits


def test_the_rate_rises_in_a_line_and_falls_in_a_cosine() -> None:
    factors = [learning_rate_factor(step, 100, 0.1) for step in range(101)]
    assert factors[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert factors[10] == 1.0
    assert factors[10:] == pytest.approx([(1 + math.cos(math.pi * t / 90)) / 2 for t in range(91)])
    assert factors[100] == pytest.approx(0)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.0), (1, 0.9), (3, 0.05), (2, 0.99), (1000, 0.5)])
def test_the_rate_stays_between_nothing_and_its_peak(steps: int, warmup: float) -> None:
    factors = [learning_rate_factor(step, steps, warmup) for step in range(steps + 1)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert max(factors) == 1.0
    assert factors[0] > 0, "the first step would be lost"


def test_noise_ends_when_it_should() -> None:
    factors = [noise_factor(step, 100, 0.5) for step in range(100)]
    assert factors[0] == 1.0
    assert factors[25] == pytest.approx(0.5)
    assert factors[49] == pytest.approx(0.02)
    assert set(factors[50:]) == {0.0}


def test_noise_may_last_to_the_end_or_never_begin() -> None:
    assert noise_factor(99, 100, 1.0) == pytest.approx(0.01)
    assert noise_factor(0, 100, 0.0) == 0.0


def test_weights_lose_a_bit_at_a_time_and_end_at_their_own() -> None:
    assert [weight_bits(epoch, 4.0, 4) for epoch in range(6)] == [8, 7, 6, 5, 4, 4]
    assert [weight_bits(epoch, 2.5, 2) for epoch in range(5)] == [8, 6, 4, 2, 2]


def test_weights_may_have_their_bits_from_the_start() -> None:
    assert weight_bits(0, 0.0, 4) == 4
