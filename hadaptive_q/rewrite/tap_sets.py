"""Cover a large kernel with small ones, at the least cost in XNNPACK's depthwise kernels.

A part of a kernel is a set of rows times a set of columns. Both are evenly spaced, so that the part is a convolution
with a dilation, and symmetric about the centre, so that its padding is the same on both sides and no operator has to
pad or cut for it. Searched are all ways to deal the rows into such sets and, for each set, the columns, or the columns
first; every tap is in one part, so no multiplication is added.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

Places = tuple[int, ...]

# Instructions for 8 channels of one result in int8 on an emulated Cortex-A76 (128 channels, 14 x 14), by the most taps
# a kernel takes. Smaller kernels pay for all of its taps.
KERNEL_COST = {3: 28, 9: 55, 25: 129}
ADD_COST = 20
MAX_TAPS = max(KERNEL_COST)


class Part(NamedTuple):
    """The taps at the crossings of `rows` and `columns`."""

    rows: Places
    columns: Places


def spacing(places: Places) -> int:
    """Return the distance of neighbours, 1 for a single place."""
    return places[1] - places[0] if len(places) > 1 else 1


def cover(height: int, width: int, padding: tuple[int, int]) -> tuple[Part, ...] | None:
    """Return the parts of a `height` x `width` kernel (both odd), cheapest first found, or None where there are none.

    A part that starts `n` places in is padded by `n` less; where `padding` (vertical, horizontal) is smaller than that,
    it would have to read a piece of its input only and is not considered.
    """
    by_rows = _deal_both(height, width, *padding)
    by_columns = _deal_both(width, height, *reversed(padding))
    swapped = by_columns and tuple(Part(rows, columns) for columns, rows in by_columns)
    found = [parts for parts in (by_rows, swapped) if parts]
    return min(found, key=cost) if found else None


def cost(parts: tuple[Part, ...]) -> int:
    """Return the instructions of all parts and their sum, per 8 channels of one result."""
    kernels = [_kernel_cost(len(rows) * len(columns)) for rows, columns in parts]
    return sum(kernels) + ADD_COST * (len(parts) - 1)


def _kernel_cost(taps: int) -> int:
    return next(price for most, price in KERNEL_COST.items() if taps <= most)


def _deal_both(outer: int, inner: int, outer_padding: int, inner_padding: int) -> tuple[Part, ...] | None:
    """Deal the outer places into sets and, for each, the inner ones: what is best depends on the set's size only."""
    best: tuple[Part, ...] | None = None
    for dealt in deals(outer, outer_padding):
        choices = [_deal_inner(inner, inner_padding, len(places)) for places in dealt]
        if all(choices):
            parts = tuple(
                Part(places, others) for places, choice in zip(dealt, choices, strict=True) for others in choice
            )
            best = parts if best is None or cost(parts) < cost(best) else best
    return best


@cache
def _deal_inner(size: int, padding: int, outer: int) -> tuple[Places, ...]:
    """Return the cheapest sets of `size` places for parts of `outer` places in the other direction, or nothing."""

    def total(dealt: tuple[Places, ...]) -> int:
        return sum(_kernel_cost(outer * len(places)) + ADD_COST for places in dealt)

    fitting = [d for d in deals(size, padding) if all(outer * len(places) <= MAX_TAPS for places in d)]
    return min(fitting, key=total, default=())


@cache
def deals(size: int, padding: int) -> tuple[tuple[Places, ...], ...]:
    """Return all ways to deal ``range(size)`` (odd) into symmetric, evenly spaced sets that start within `padding`.

    Few sets come first, and the set of the outermost places leads.
    """
    found = _deal_rest(tuple(range(size)), size, padding)
    return tuple(sorted(found, key=len))


def _deal_rest(rest: Places, size: int, padding: int) -> Iterator[tuple[Places, ...]]:
    if not rest:
        yield ()
        return
    first = rest[0]
    if first > padding:
        return
    last = size - 1 - first
    for step in range(1, last - first + 1) if last > first else (1,):
        places = tuple(range(first, last + 1, step))
        if (last - first) % step or not set(places) <= set(rest):
            continue
        remaining = tuple(place for place in rest if place not in places)
        for others in _deal_rest(remaining, size, padding):
            yield (places, *others)
