"""Intervals of a drop against published figures and the test they invert, and the numbers of images they ask for."""

from __future__ import annotations

import math

import pytest

from hadaptive_q.significance import Drop, needed_samples


def test_the_interval_is_the_published_one() -> None:
    # Airway hyper-responsiveness before and after a transplant, 21 children: Fagerland, Lydersen, Laake 2013, table 4.
    low, high = Drop(1, 7, 21).interval
    assert (round(low / 100, 3), round(high / 100, 3)) == (-0.517, -0.026)


def test_without_a_difference_it_is_the_closed_form() -> None:
    z = 1.959964
    low, high = Drop(0, 0, 359).interval
    assert high == pytest.approx(100 * z**2 / (359 + z**2), rel=1e-5)
    assert low == pytest.approx(-high)


@pytest.mark.parametrize(("lost", "won"), [(12, 2), (11, 3), (10, 3), (9, 3), (20, 10), (21, 9)])
def test_zero_lies_outside_exactly_where_mcnemar_says_so(lost: int, won: int) -> None:
    significant = (lost - won) ** 2 / (lost + won) > 1.959964**2
    assert (Drop(lost, won, 1000).interval[0] > 0) == significant


@pytest.mark.parametrize(("lost", "won", "samples"), [(0, 0, 1), (1, 0, 1), (0, 1, 1), (5, 5, 10), (300, 10, 5000)])
def test_every_interval_holds_its_drop_and_mirrors(lost: int, won: int, samples: int) -> None:
    drop, mirrored = Drop(lost, won, samples), Drop(won, lost, samples)
    low, high = drop.interval
    assert -100 <= low <= drop.points <= high <= 100
    assert mirrored.interval == pytest.approx((-high, -low), abs=1e-6)


@pytest.mark.parametrize(("lost", "won", "limit"), [(0, 0, 0.5), (1, 0, 0.5), (3, 2, 1.0), (4, 0, 0.5)])
def test_as_many_images_as_it_says_decide(lost: int, won: int, limit: float) -> None:
    drop = Drop(lost, won, 359)
    needed = needed_samples(drop, limit)
    assert needed is not None
    assert needed > 359

    def decides(samples: float) -> bool:
        share = samples / 359
        low, high = Drop(lost * share, won * share, samples).interval
        return high <= limit or low > limit

    assert decides(needed)
    assert not decides(math.floor(0.98 * needed))


def test_no_number_of_images_tells_a_drop_from_itself() -> None:
    assert needed_samples(Drop(1, 0, 200), 0.5) is None
