from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hadaptive_q.quant.observers import RangeObserver

LEVELS = 256
FEW = 16  # four bits: coarse codes make clipping worth while


def observed(name: str, *batches: Tensor, levels: int = LEVELS) -> tuple[float, float]:
    observer = RangeObserver(name, levels)  # type: ignore[arg-type]
    for batch in batches:
        observer.watch(batch)
    low, high = observer.range()
    return float(low), float(high)


def error(x: Tensor, low: float, high: float, levels: int = LEVELS) -> float:
    """Return the mean squared error of storing `x` in codes over (low, high), as the fake-quantizer does."""
    scale = (high - low) / (levels - 1)
    zero_point = round(-levels / 2 - low / scale)
    codes = ((x / scale).round() + zero_point).clamp(-levels / 2, levels / 2 - 1)
    return float(((codes - zero_point) * scale - x).square().mean())


def heavy_tailed(seed: int, sign: str) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 10, 50, generator=generator) / torch.rand(4, 10, 50, generator=generator).clamp_min(0.02)
    return {"both": x, "positive": x.abs(), "negative": -x.abs()}[sign]


@pytest.mark.parametrize("name", ["minmax", "mse", "histogram"])
@pytest.mark.parametrize(
    ("values", "low", "high"),
    [([1.0, 3.0], 0.0, 3.0), ([-3.0, -1.0], -3.0, 0.0), ([0.0, 0.0], 0.0, 0.0), ([-1.0, 2.0], -1.0, 2.0)],
)
def test_a_range_always_contains_zero(name: str, values: list[float], low: float, high: float) -> None:
    got = observed(name, torch.tensor(values))
    assert got[0] <= 0 <= got[1]
    if name == "minmax":
        assert got == (low, high)
    else:
        assert low <= got[0]
        assert got[1] <= high


def test_minmax_covers_every_batch() -> None:
    batches = [torch.tensor([0.5, 1.0]), torch.tensor([-2.0, 0.0]), torch.tensor([[0.1], [7.0]])]
    assert observed("minmax", *batches) == (-2.0, 7.0)
    assert observed("minmax", *reversed(batches)) == (-2.0, 7.0)


@pytest.mark.parametrize("sign", ["both", "positive", "negative"])
@pytest.mark.parametrize("seed", range(5))
def test_mse_is_never_worse_than_minmax_on_what_it_sampled(seed: int, sign: str) -> None:
    x = heavy_tailed(seed, sign)
    observer = RangeObserver("mse", LEVELS)
    observer.watch(x)
    sample = torch.cat(observer.samples)
    low, high = (float(end) for end in observer.range())
    best, plain = error(sample, low, high), error(sample, *observed("minmax", x))
    # The search and this test round their zero point by slightly different sums: 1e-5.
    assert best <= plain * (1 + 1e-5)


@pytest.mark.parametrize("sign", ["both", "positive", "negative"])
def test_mse_clips_rare_outliers_and_all_the_data_gain(sign: str) -> None:
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).abs()
    x[:5] = 8.0
    x = {"both": torch.cat((x, -x)), "positive": x, "negative": -x}[sign]
    (low, high), (wide_low, wide_high) = observed("mse", x, levels=FEW), observed("minmax", x, levels=FEW)
    assert high - low < 0.7 * (wide_high - wide_low)
    assert error(x, low, high, FEW) < 0.6 * error(x, wide_low, wide_high, FEW)


def test_mse_keeps_a_range_that_is_used_throughout() -> None:
    x = torch.linspace(-1, 1, 4096)
    low, high = observed("mse", x)
    assert (low, high) == pytest.approx((-1, 1), abs=0.03)


def test_each_end_is_clipped_on_its_own() -> None:
    x = torch.rand(4000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x[:4] = 4.0
    low, high = observed("mse", x, levels=FEW)
    assert low == pytest.approx(-1, abs=0.15), "nothing to clip below"
    best = min(torch.linspace(0.5, 4, 200).tolist(), key=lambda end: error(x, -1.0, end, FEW))
    # Values are drawn with replacement, so that the four count a little more or less than they are.
    assert high == pytest.approx(best, abs=0.2)
    assert error(x, low, high, FEW) <= 1.02 * error(x, -1.0, best, FEW)


def test_observing_repeats_exactly() -> None:
    batches = [heavy_tailed(seed, "both") for seed in range(3)]
    assert observed("mse", *batches) == observed("mse", *batches)


def test_a_sample_sees_every_column_of_an_image() -> None:
    """A stride that divides the width would see one column only; here that column is empty."""
    x = torch.zeros(1, 64, 64, 64)
    x[..., 1:] = torch.rand(64, 64, 63, generator=torch.Generator().manual_seed(0))
    observer = RangeObserver("mse", LEVELS)
    observer.watch(x)
    assert float((observer.samples[0] > 0).float().mean()) > 0.9


def test_the_sample_is_forgotten_once_used() -> None:
    observer = RangeObserver("mse", LEVELS)
    observer.watch(heavy_tailed(0, "both"))
    assert observer.samples
    observer.range()
    assert observer.samples == []


@pytest.mark.parametrize("name", ["minmax", "mse", "histogram"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_no_numbers_are_refused_and_leave_no_trace(name: str, bad: float) -> None:
    observer = RangeObserver(name, LEVELS)  # type: ignore[arg-type]
    observer.watch(torch.tensor([-1.0, 1.0]))
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        observer.watch(torch.tensor([0.0, bad]))
    assert (float(observer.low), float(observer.high)) == (-1.0, 1.0)
    assert len(observer.samples) == (name == "mse")


@pytest.mark.parametrize("sign", ["both", "positive", "negative"])
@pytest.mark.parametrize("levels", [FEW, LEVELS])
def test_a_histogram_finds_the_best_range_of_all_values(sign: str, levels: int) -> None:
    batches = [heavy_tailed(seed, sign) for seed in range(4)]
    x = torch.cat(batches)
    low, high = observed("histogram", *batches, levels=levels)
    found = error(x, low, high, levels)
    assert found <= error(x, *observed("minmax", x), levels)
    for lower in torch.linspace(0.1, 1, 19).tolist():
        for upper in torch.linspace(0.1, 1, 19).tolist():
            ends = float(x.min().clamp_max(0)) * lower, float(x.max().clamp_min(0)) * upper
            assert found <= 1.02 * error(x, *ends, levels)


def test_a_histogram_sees_what_a_sample_misses() -> None:
    """One slot of many is far larger than the others: its values are all there, or the sample holds next to none."""
    x = torch.randn(64, 600, 4, 4, generator=torch.Generator().manual_seed(0))
    x[:, 0] *= 60
    low, high = observed("histogram", x)
    sampled = observed("mse", x)
    assert error(x, low, high) < error(x, *sampled)


@pytest.mark.parametrize("name", ["minmax", "mse", "histogram"])
def test_below_the_floor_all_values_are_one(name: str) -> None:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 10
    observer, other = (RangeObserver(name, LEVELS, floor) for floor in (-3.0, -math.inf))  # type: ignore[arg-type]
    observer.watch(x)
    other.watch(x.clamp_min(-3.0))
    low, high = observer.range()
    assert (low, high) == other.range()
    assert float(low) == pytest.approx(-3, abs=0.2)
    with pytest.raises(FloatingPointError):
        observer.watch(torch.tensor([-math.inf]))


def test_watching_takes_no_gradient() -> None:
    x = torch.randn(10, requires_grad=True)
    observer = RangeObserver("mse", LEVELS)
    observer.watch(x)
    assert not observer.samples[0].requires_grad
    assert not observer.high.requires_grad
