"""The codes of any value on any grid against torch's own operators, and the definition of rounding."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from hypothesis import example, given
from hypothesis import strategies as st

# Registers the quantize and dequantize operators.
import hadaptive_q.quant.backends.torchao_pt2e  # noqa: F401
from hadaptive_q.quant import arithmetic
from hadaptive_q.quant.arithmetic import Grid
from hadaptive_q.quant.formats import SMALLEST_SCALE

Q = torch.ops.quantized_decomposed
SCALES = st.floats(SMALLEST_SCALE, 2.0**60, width=32) | st.integers(-12, 20).map(lambda power: 2.0**power)
GRIDS = st.builds(Grid, SCALES, st.integers(-128, 127))
VALUES = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=16)
CODES = st.lists(st.integers(-128, 127), min_size=1, max_size=16)


@given(VALUES, GRIDS)
@example([0.5, 1.5, 2.5, -0.5, -1.5], Grid(1.0, 0))
@example([3.4e38, -3.4e38, 1e-45], Grid(SMALLEST_SCALE, 127))
def test_codes_are_those_of_the_operators(values: list[float], grid: Grid) -> None:
    x = torch.tensor(values)
    wanted = Q.quantize_per_tensor(x, grid.scale, grid.zero_point, -128, 127, torch.int8)
    codes = arithmetic.quantize(x, grid)
    assert torch.equal(codes, wanted)
    back = Q.dequantize_per_tensor(codes, grid.scale, grid.zero_point, -128, 127, torch.int8)
    assert torch.equal(arithmetic.dequantize(codes, grid), back)


@given(CODES, GRIDS)
def test_a_value_on_the_grid_keeps_its_code(codes: list[int], grid: Grid) -> None:
    wanted = torch.tensor(codes, dtype=torch.int8)
    assert torch.equal(arithmetic.quantize(arithmetic.dequantize(wanted, grid), grid), wanted)


@given(st.lists(st.integers(-512, 512), min_size=1), st.integers(-12, 20), st.integers(-128, 127))
def test_halves_go_to_the_even_code(halves: list[int], power: int, zero_point: int) -> None:
    """On a power of two everything but the rounding is exact, and `Fraction` rounds half to even."""
    scale = 2.0**power
    codes = arithmetic.quantize(torch.tensor(halves) * scale / 2, Grid(scale, zero_point))
    assert codes.tolist() == [min(max(round(Fraction(half, 2)) + zero_point, -128), 127) for half in halves]


@given(CODES, CODES, GRIDS, GRIDS, GRIDS)
def test_a_sum_misses_the_exact_one_by_its_fixed_point(
    a: list[int], b: list[int], a_grid: Grid, b_grid: Grid, out: Grid
) -> None:
    ratios = a_grid.scale / out.scale, b_grid.scale / out.scale
    if not all(arithmetic.SMALLEST_RATIO * 1.01 < ratio < arithmetic.LARGEST_RATIO * 0.99 for ratio in ratios):
        return
    pairs = list(zip(a, b, strict=False))
    first, second = (torch.tensor(part, dtype=torch.int8) for part in zip(*pairs, strict=True))
    found = arithmetic.add(first, second, a_grid, b_grid, out)
    # Factors are rounded to 20 bits of the larger: 255 times that error twice, and half a code of the result.
    shift = arithmetic.fixed_point(a_grid.scale, b_grid.scale, out.scale)[1]
    allowed = 0.5 + 2 * 255 * (0.5 / 2**shift + 2**-23 * max(ratios))
    for (one, other), code in zip(pairs, found.tolist(), strict=True):
        exact = (one - a_grid.zero_point) * ratios[0] + (other - b_grid.zero_point) * ratios[1] + out.zero_point
        assert math.isclose(min(max(exact, -128), 127), code, rel_tol=0, abs_tol=allowed)
