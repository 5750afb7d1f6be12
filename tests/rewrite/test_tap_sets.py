from __future__ import annotations

from itertools import pairwise, product

import pytest

from hadaptive_q.rewrite.tap_sets import MAX_TAPS, cost, cover, deals


@pytest.mark.parametrize("padding", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 3, 5, 7, 9, 11])
def test_places_are_dealt_into_symmetric_even_sets(size: int, padding: int) -> None:
    ways = deals(size, padding)
    assert len(set(ways)) == len(ways) > 0
    assert ways[0] == (tuple(range(size)),), "whole first"
    for sets in ways:
        assert sorted(place for places in sets for place in places) == list(range(size))
        for places in sets:
            assert len({b - a for a, b in pairwise(places)}) <= 1, "evenly spaced"
            assert list(places) == [size - 1 - place for place in reversed(places)], "symmetric"
            assert places[0] <= padding


def test_all_ways_of_five() -> None:
    assert set(deals(5, 2)) == {
        ((0, 1, 2, 3, 4),),
        ((0, 2, 4), (1, 3)),
        ((0, 4), (1, 2, 3)),
        ((0, 4), (1, 3), (2,)),
    }


@pytest.mark.parametrize(
    ("height", "width", "padding"),
    [
        (7, 7, (3, 3)),
        (7, 7, (1, 1)),
        (7, 7, (3, 0)),
        (7, 7, (0, 3)),
        (9, 5, (4, 2)),
        (11, 11, (5, 5)),
        (31, 3, (15, 1)),
    ],
)
def test_every_tap_is_in_one_part(height: int, width: int, padding: tuple[int, int]) -> None:
    parts = cover(height, width, padding)
    assert parts is not None
    taps = [tap for rows, columns in parts for tap in product(rows, columns)]
    assert sorted(taps) == list(product(range(height), range(width)))
    for rows, columns in parts:
        assert len(rows) * len(columns) <= MAX_TAPS
        assert rows[0] <= padding[0]
        assert columns[0] <= padding[1]


def test_a_7x7_takes_two_kernels_of_25_taps_and_one_of_9() -> None:
    parts = cover(7, 7, (3, 3))
    assert parts is not None
    assert sorted(len(rows) * len(columns) for rows, columns in parts) == [8, 20, 21]
    assert cost(parts) == 129 + 129 + 55 + 2 * 20


def test_the_longer_side_may_come_first() -> None:
    tall, wide = cover(11, 3, (5, 1)), cover(3, 11, (1, 5))
    assert tall is not None
    assert wide is not None
    assert cost(tall) == cost(wide)
    assert {(columns, rows) for rows, columns in wide} == {tuple(part) for part in tall}


def test_without_padding_there_is_no_cover() -> None:
    assert cover(7, 7, (0, 0)) is None
