"""Ranges of operands and norms chosen together: the search, the samples behind it, and what an ACH keeps in int8."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from hadaptive_q.lower.parity import sqnr_db
from hadaptive_q.models.ach import ACH, DySoft
from hadaptive_q.models.blocks import Bottleneck
from hadaptive_q.models.config import ACHConfig, Norm
from hadaptive_q.models.cross_hadamard import pair_indices
from hadaptive_q.quant.backends import torchao_pt2e as backend
from hadaptive_q.quant.observers import ObserverName, Range, Weighted, best_range, quantize
from hadaptive_q.quant.plan import make_plan
from hadaptive_q.quant.product import PIXELS, Objective, PixelSampler, find_ranges, relative_error
from hadaptive_q.quant.sites import quantizer_of
from hadaptive_q.recipe import QuantizeConfig
from hadaptive_q.rewrite.deploy import deploy_graph
from hadaptive_q.rewrite.fold_dysoft import stored_range
from hadaptive_q.rewrite.products import Product, find_products, norm_of_products
from hadaptive_q.rewrite.record import record
from hadaptive_q.rewrite.roll_pairs import slot_order

CHANNELS, CS, SIZE = 32, 12, 64  # a map of 8 x 8
LEVELS = 256


class Net(nn.Module):
    """An ACH bottleneck whose channels are independent and nearly normal, with a frozen selection."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, CHANNELS, 8, stride=8)
        self.block = Bottleneck(CHANNELS, ACHConfig(channels=CHANNELS, cs=CS, k=5, norm=norm), "rank")
        ach = self.ach
        with torch.no_grad():
            nn.init.orthogonal_(self.first.weight.view(CHANNELS, -1))
            nn.init.orthogonal_(ach.pointwise.weight.view(CHANNELS, -1))
            assert isinstance(ach.norm, nn.BatchNorm2d | DySoft)
            ach.norm.bias.normal_(std=0.2)
            spread = torch.randn_like(ach.norm.weight)
            ach.norm.weight.copy_((0.6 * spread).exp() if norm == "batch_norm" else 1 + 0.15 * spread)
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = None
            ach.freeze(torch.randperm(CHANNELS)[:CS])
            self.train()
            for seed in range(4):
                self(images(seed, 32))
        self.eval()

    @property
    def ach(self) -> ACH:
        assert isinstance(self.block.expansion, ACH)
        return self.block.expansion

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.first(x))


def images(seed: int, count: int) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


CALIBRATION = [images(seed, 32) for seed in range(10, 14)]


@dataclass
class Quantized:
    """A float deploy graph, the calibrated one, and the product in both."""

    reference: GraphModule
    calibrated: GraphModule
    product: Product

    def ranges(self) -> tuple[float, ...]:
        return tuple(float(end) for name in ("mixed", "normed") for end in (self._of(name).low, self._of(name).high))

    def _of(self, name: str) -> nn.Module:
        return quantizer_of(self.calibrated, getattr(self.product, name))

    def ach(self, x: Tensor) -> dict[str, Tensor]:
        """Return X~ and N of `x` in float, as the two ranges store them, and with one of both ranges at work."""
        p = self.product
        values = record(self.reference, x, {p.mixed, p.chosen, p.normed})
        mixed, normed = self._of("mixed"), self._of("normed")
        norm = norm_of_products(self.reference, p)
        with torch.no_grad():
            by_operands = norm(mixed(values[p.chosen]))
            return {
                "mixed": values[p.mixed],
                "normed": values[p.normed],
                "stored_mixed": mixed(values[p.mixed]),
                "stored_normed": normed(by_operands),
                "by_operands": by_operands,
                "by_output": normed(values[p.normed]),
            }


@functools.cache
def trained(norm: Norm) -> Net:
    return Net(norm)


@functools.cache
def quantized(norm: Norm, observer: ObserverName = "product", gain: float = 1.0) -> Quantized:
    """Return the bottleneck with X~ `gain` times as large, quantized."""
    model = copy.deepcopy(trained(norm))
    with torch.no_grad():
        model.ach.bn.weight.mul_(gain)
        model.ach.bn.bias.mul_(gain)
    return calibrated(model, observer, CALIBRATION)


def calibrated(model: nn.Module, observer: ObserverName, batches: list[Tensor]) -> Quantized:
    graph = deploy_graph(model, SIZE)
    reference = copy.deepcopy(graph)
    ready = backend.calibrate(backend.prepare(graph, make_plan(graph, QuantizeConfig()), observer), batches)
    (product,) = find_products(reference)
    return Quantized(reference, ready.graph, product)


# What an ACH keeps --------------------------------------------------------------------------------------------------

# Decibels of the norm's output by gain of X~. Behind a DySoft, the rounding of X~ limits (see the test below).
WANTED = {("dysoft", 1): 35, ("dysoft", 4): 33, ("dysoft", 8): 28} | {("batch_norm", gain): 30 for gain in (1, 4, 8)}


@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize(("norm", "gain"), WANTED)
def test_products_of_large_activations(norm: Norm, gain: int, batch: int) -> None:
    values = quantized(norm, gain=float(gain)).ach(images(1, batch))
    assert sqnr_db(values["mixed"], values["stored_mixed"]) >= 35
    assert sqnr_db(values["normed"], values["stored_normed"]) >= WANTED[norm, gain]


@pytest.mark.parametrize(("norm", "least"), [("dysoft", 35), ("batch_norm", 30)])
@pytest.mark.parametrize("gain", [1, 4, 8])
def test_the_whole_output_of_an_ach(norm: Norm, least: float, gain: int) -> None:
    """X~ and normed products side by side, in the units of the network: gains per slot undone."""
    x = images(1, 32)
    values = quantized(norm, gain=float(gain)).ach(x)
    model = copy.deepcopy(trained(norm))
    with torch.no_grad():
        model.ach.bn.weight.mul_(gain)
        model.ach.bn.bias.mul_(gain)
        truth = model.ach(model.first(x))[:, CHANNELS:][:, slot_order(CS)]
        normed = values["normed"]
        gains = (truth * normed).sum((0, 2, 3), keepdim=True) / normed.square().sum((0, 2, 3), keepdim=True)
        torch.testing.assert_close(normed * gains, truth, rtol=1e-3, atol=1e-4 * float(truth.abs().max()))
        wanted = torch.cat((values["mixed"], truth), dim=1)
        found = torch.cat((values["stored_mixed"], values["stored_normed"] * gains), dim=1)
    assert sqnr_db(wanted, found) >= least


def test_behind_a_saturated_dysoft_the_rounding_of_operands_limits() -> None:
    """At gain 8 a DySoft is nearly a step at zero, where one code of X~ is worth a good part of it.

    A narrow range would serve the products, and ruin X~ for its other reader: the objective weighs both.
    """
    q = quantized("dysoft", gain=8.0)
    values = q.ach(images(1, 32))
    by_operands = sqnr_db(values["normed"], values["by_operands"])
    assert by_operands < 31
    assert sqnr_db(values["normed"], values["by_output"]) > by_operands + 15
    norm = norm_of_products(q.reference, q.product)
    chosen = record(q.reference, images(1, 32), {q.product.chosen})[q.product.chosen]
    end = torch.tensor(10.0)
    with torch.no_grad():
        assert sqnr_db(values["normed"], norm(quantize(chosen, -end, end, LEVELS))) > by_operands + 3
    assert sqnr_db(values["mixed"], quantize(values["mixed"], -end, end, LEVELS)) < 15


def objective_of(values: dict[str, Tensor]) -> float:
    terms = (relative_error(values[name], values[f"stored_{name}"]) for name in ("mixed", "normed"))
    return float(sum(terms))


@pytest.mark.parametrize("gain", [1, 4, 8])
@pytest.mark.parametrize("norm", ["dysoft", "batch_norm"])
def test_on_images_it_never_saw_the_objective_is_no_worse_than_with_ranges_by_themselves(norm: Norm, gain: int) -> None:
    x = images(1, 32)
    found = objective_of(quantized(norm, "product", float(gain)).ach(x))
    assert found < 0.85 * objective_of(quantized(norm, "minmax", float(gain)).ach(x))
    for other in ("mse", "histogram"):
        assert found < 1.01 * objective_of(quantized(norm, other, float(gain)).ach(x))  # type: ignore[arg-type]
    if norm == "dysoft" and gain > 1:
        assert found < 0.9 * objective_of(quantized(norm, "histogram", float(gain)).ach(x))


@pytest.mark.parametrize("norm", ["dysoft", "batch_norm"])
def test_a_batch_is_its_images(norm: Norm) -> None:
    graph = quantized(norm).calibrated
    x = images(1, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat([graph(x[i : i + 1]) for i in range(4)]), graph(x)[:4])


@pytest.mark.parametrize("norm", ["dysoft", "batch_norm"])
@pytest.mark.parametrize("kind", ["zero", "constant", "saturating"])
def test_unusual_images(norm: Norm, kind: str) -> None:
    q = quantized(norm)
    x = {"zero": images(1, 2) * 0, "constant": images(1, 2) * 0 + 1.5, "saturating": images(1, 2) * 100}[kind]
    values = q.ach(x)
    low, high, normed_low, normed_high = q.ranges()
    step, normed_step = (high - low) / 255, (normed_high - normed_low) / 255
    for name, ends, size in (("mixed", (low, high), step), ("normed", (normed_low, normed_high), normed_step)):
        stored = values[f"stored_{name}"]
        assert stored.isfinite().all()
        assert ends[0] - size <= float(stored.min()) <= float(stored.max()) <= ends[1] + size
    # Each tensor by itself is off by half a step inside its range, and by what lies outside beyond.
    within = values["mixed"].clamp(low, high)
    assert float((values["stored_mixed"] - within).abs().max()) <= 1.01 * step
    within = values["normed"].clamp(normed_low, normed_high)
    assert float((values["by_output"] - within).abs().max()) <= 1.01 * normed_step
    with torch.no_grad():
        assert q.calibrated(x).isfinite().all()


@pytest.mark.parametrize("norm", ["dysoft", "batch_norm"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_calibration_on_constant_images(norm: Norm, value: float) -> None:
    q = calibrated(trained(norm), "product", [torch.full((2, 3, SIZE, SIZE), value)] * 2)
    ends = q.ranges()
    assert all(torch.tensor(ends).isfinite())
    assert ends[0] <= 0 <= ends[1]
    assert ends[2] <= 0 <= ends[3]
    with torch.no_grad():
        assert q.calibrated(images(0, 2)).isfinite().all()


def test_calibration_repeats_exactly() -> None:
    first, second = (calibrated(trained("dysoft"), "product", CALIBRATION[:2]) for _ in range(2))
    assert first.ranges() == second.ranges()


# The range of a DySoft ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gain", [1.0, 8.0])
def test_the_range_of_a_dysoft_lies_within_its_own_bounds(gain: float) -> None:
    q = quantized("dysoft", gain=gain)
    nodes = {node.name: node for node in q.reference.graph.nodes}
    bounds = stored_range(q.reference, nodes[q.product.normed])
    assert bounds is not None
    low, high = bounds
    normed = q.ach(images(1, 32) * 1e4)["normed"]
    assert low <= float(normed.min())
    assert float(normed.max()) <= high
    # Met, too: an infinitely large product reaches them.
    assert float(normed.min()) == pytest.approx(low, abs=1e-3)
    assert float(normed.max()) == pytest.approx(high, abs=1e-3)
    assert low <= q.ranges()[2] <= 0 <= q.ranges()[3] <= high
    if gain > 1:  # what is reached is kept
        assert q.ranges()[3] - q.ranges()[2] > 0.9 * (high - low)


def test_another_norm_has_no_bounds() -> None:
    q = quantized("batch_norm")
    nodes = {node.name: node for node in q.reference.graph.nodes}
    assert stored_range(q.reference, nodes[q.product.normed]) is None
    assert stored_range(q.reference, nodes[q.product.mixed]) is None


# The search ---------------------------------------------------------------------------------------------------------


def test_ranges_stay_within_their_limits_and_the_objective_falls() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randn(1, 4, 1, 500, generator=generator)
    values = Weighted(chosen.flatten(), torch.ones(chosen.numel()))
    i, j = pair_indices(4)

    def norm(z: Tensor) -> Tensor:
        product = 6 * z[:, i] * z[:, j]
        return product / (1 + product.abs())

    objective = Objective(values, chosen, norm, 16)
    limits = (chosen.min(), chosen.max()), (torch.tensor(-1.0), torch.tensor(1.0))
    start = best_range(values, limits[0], 16), limits[1]

    def of(ranges: tuple[Range, Range]) -> float:
        stored = quantize(objective.normed(ranges[0]), *ranges[1], 16)
        return float(relative_error(norm(chosen), stored) + objective.of_mixed(ranges[0]))

    found = find_ranges(objective, limits, start)
    for (low, high), (lowest, highest) in zip(found, limits, strict=True):
        assert lowest <= low <= 0 <= high <= highest
    assert of(found) < 0.95 * of(start)
    # No step of any end to either side gains a twentieth.
    for which in (0, 1):
        for end in (0, 1):
            for factor in (0.9, 1.1):
                moved = [list(r) for r in found]
                moved[which][end] = moved[which][end] * factor
                assert of((tuple(moved[0]), tuple(moved[1]))) > 0.95 * of(found)  # type: ignore[arg-type]


def test_the_sample_is_bounded_and_drawn_from_all_batches_alike() -> None:
    sampler = PixelSampler()
    for batch in range(6):
        numbered = torch.arange(2 * 50 * 50).reshape(2, 1, 50, 50) + 5000.0 * batch
        sampler.add(torch.cat((numbered, -numbered), dim=1))
    chosen = sampler.chosen()
    assert chosen.shape == (1, 2, 1, PIXELS)
    assert torch.equal(chosen[:, 0], -chosen[:, 1]), "channels of one pixel stay together"
    pixels = chosen[0, 0, 0]
    assert len(pixels.unique()) == PIXELS, "without replacement"
    counts = torch.bincount((pixels / 5000).long(), minlength=6)
    assert (counts - PIXELS / 6).abs().max() < 5 * (PIXELS / 6) ** 0.5


def test_few_pixels_are_all_kept() -> None:
    sampler = PixelSampler()
    sampler.add(torch.arange(8.0).reshape(2, 2, 2, 1))
    assert sorted(sampler.chosen()[0, 0, 0].tolist()) == [0, 1, 4, 5]


def test_a_sample_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no pixel"):
        PixelSampler().chosen()
