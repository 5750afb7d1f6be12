from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from hadaptive_q.quant.histogram import BINS, Histogram


def counted(*batches: Tensor) -> tuple[Tensor, Tensor]:
    histogram = Histogram()
    for batch in batches:
        histogram.add(batch)
    return histogram.values()


def normal(seed: int, scale: float) -> Tensor:
    return torch.randn(3, 500, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_every_value_is_counted_within_half_a_bin(scale: float) -> None:
    x = normal(0, scale)
    centres, counts = counted(x)
    assert float(counts.sum()) == x.numel()
    bin_width = float(x.abs().max()) * 4 / BINS  # the range is at most twice what the values need
    values = centres.repeat_interleave(counts.long())
    assert float((values - x.flatten().sort().values).abs().max()) <= 0.51 * bin_width


def test_the_order_of_batches_does_not_matter() -> None:
    batches = [normal(0, 0.01), normal(1, 1.0), torch.zeros(7), normal(2, 50.0)]
    wanted = counted(*batches)
    for order in itertools.permutations(batches):
        for got, same in zip(counted(*order), wanted, strict=True):
            assert torch.equal(got, same)


def test_widening_loses_nothing_and_takes_no_memory() -> None:
    histogram = Histogram()
    for exponent in range(-10, 10):
        histogram.add(torch.tensor([2.0**exponent * 0.99, -(2.0**exponent) * 0.99]))
        assert len(histogram.counts) == BINS
    centres, counts = histogram.values()
    assert float(counts.sum()) == 40
    assert torch.equal(centres, -centres.flip(0)), "as symmetric as what was counted"


@pytest.mark.parametrize("values", [[0.0], [0.0, 0.0, 3.0]])
def test_zeros(values: list[float]) -> None:
    centres, counts = counted(torch.tensor(values))
    assert float(counts.sum()) == len(values)
    assert float(centres.abs().min()) <= 2 * 4 / BINS
