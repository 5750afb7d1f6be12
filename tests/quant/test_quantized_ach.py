"""QuantizedACH: fake-quantized against integers, integers against Python's and against a converted network's."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from hadaptive_q.data.datasets import ImageData
from hadaptive_q.lower.parity import sqnr_db
from hadaptive_q.models.ach import ACH, DySoft
from hadaptive_q.models.config import Norm, SlotOrder
from hadaptive_q.models.hadaptive_net import HadaptiveNet
from hadaptive_q.quant import arithmetic
from hadaptive_q.quant.arithmetic import Grid
from hadaptive_q.quant.backends import torchao_pt2e as backend
from hadaptive_q.quant.fake_quant import ActivationFakeQuantize
from hadaptive_q.quant.interpreter import IntegerProgram
from hadaptive_q.quant.plan import make_plan
from hadaptive_q.quant.quantized_ach import ACHCodes, QuantizedACH, multiply_pairs
from hadaptive_q.recipe import QuantizeConfig
from hadaptive_q.rewrite.deploy import deploy_graph
from hadaptive_q.rewrite.products import find_products
from hadaptive_q.rewrite.roll_pairs import slot_order as rolled_order

C, CS = 24, 8
NORMS = cast(list[Norm], ["dysoft", "batch_norm"])
ORDERS = cast(list[SlotOrder], ["rank", "channel"])


def float_ach(norm: Norm = "dysoft", order: SlotOrder = "rank", frozen: bool = False) -> ACH:
    """An ACH in eval mode with statistics of its inputs and no parameter at its start."""
    torch.manual_seed(0)
    ach = ACH(C, CS, norm, order)
    with torch.no_grad():
        for name, parameter in ach.named_parameters():
            if not name.startswith(("pointwise.weight", "scorer")):
                parameter.add_(torch.randn_like(parameter) * 0.2)
        for _ in range(30):
            ach.train()(torch.randn(32, C, 6, 6))
    if frozen:
        ach.freeze(torch.randperm(C)[:CS])
    return ach.eval()


def quantized(ach: ACH, symmetric: bool = True) -> QuantizedACH:
    layer = QuantizedACH(ach, symmetric=symmetric)
    layer.calibrate(torch.randn(128, C, 6, 6, generator=torch.Generator().manual_seed(1)).split(32))
    return layer.eval()


def codes_of(layer: QuantizedACH, out: Tensor) -> ACHCodes:
    """Return what `forward` delivers as codes."""
    mixed, products = out[:, :C] / layer.mixed_grid.scale, out[:, C:] / layer.gain[:, None, None]
    products = products / layer.products_grid.scale
    return ACHCodes(mixed.round() + layer.mixed_grid.zero_point, products.round() + layer.products_grid.zero_point)


def assert_nearly_equal(found: Tensor, wanted: Tensor) -> None:
    """One code at most, in less than one element of a thousand."""
    difference = (found.float() - wanted.float()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-3


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(("norm", "order"), itertools.product(NORMS, ORDERS))
def test_fake_quantized_is_integer(norm: Norm, order: SlotOrder, frozen: bool, symmetric: bool) -> None:
    ach = float_ach(norm, order, frozen)
    layer = quantized(ach, symmetric)
    assert (layer.mixed_grid.zero_point == 0) == symmetric
    x = torch.randn(64, C, 6, 6, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        out = layer(x)
    wanted = layer.integer(arithmetic.quantize(x, layer.input_grid))
    for found, codes in zip(codes_of(layer, out), wanted, strict=True):
        assert_nearly_equal(found, codes)
        assert len(codes.unique()) > 150, "most codes are in use"
    if frozen:  # A choice that flips moves products to other slots: only the fixed one compares with float.
        assert sqnr_db(ach(x)[:, :C], out[:, :C]) > 30
        assert sqnr_db(ach(x)[:, C:], out[:, C:]) > (32 if norm == "dysoft" else 26)


@pytest.mark.parametrize("batch", [1, 32])
def test_a_batch_is_its_samples(batch: int) -> None:
    layer = quantized(float_ach())
    codes = torch.randint(-128, 128, (batch, C, 5, 7), generator=torch.Generator().manual_seed(3), dtype=torch.int8)
    whole = layer.integer(codes)
    assert whole.mixed.shape == (batch, C, 5, 7)
    assert whole.products.shape == (batch, CS * (CS - 1) // 2, 5, 7)
    alone = [layer.integer(one) for one in codes.split(1)]
    assert torch.equal(torch.cat([one.mixed for one in alone]), whole.mixed)
    assert torch.equal(torch.cat([one.products for one in alone]), whole.products)


@pytest.mark.parametrize("value", [0.0, 0.7, 1e6, -1e6])
@pytest.mark.parametrize("norm", NORMS)
def test_constant_zero_and_saturating_inputs(norm: Norm, value: float) -> None:
    layer = quantized(float_ach(norm))
    x = torch.full((2, C, 4, 4), value)
    with torch.no_grad():
        found = codes_of(layer, layer(x))
    codes = layer.integer(arithmetic.quantize(x, layer.input_grid))
    assert torch.equal(found.mixed, codes.mixed.float())
    assert torch.equal(found.products, codes.products.float())


def test_zero_codes_give_what_the_biases_give() -> None:
    """X = 0: X~ is the bias, on its grid; products and norm follow by hand."""
    layer = quantized(float_ach(frozen=True))
    source, mid, out = layer.input_grid, layer.mixed_grid, layer.products_grid
    codes = layer.integer(torch.full((1, C, 1, 1), source.zero_point, dtype=torch.int8))
    mixed = [max(-128, min(127, round(float(b) / mid.scale))) for b in layer.bias]
    assert codes.mixed.flatten().tolist() == mixed
    ach = float_ach(frozen=True)
    assert isinstance(ach.norm, DySoft)
    chosen = cast(Tensor, ach.frozen).tolist()
    w, b, alpha = ach.norm.weight.flatten(), ach.norm.bias.flatten(), float(ach.norm.alpha)
    for slot, (i, j) in enumerate(itertools.combinations(range(CS), 2)):
        t = alpha * mixed[chosen[i]] * mixed[chosen[j]] * mid.scale**2
        normed = float(w[slot]) * t / (1 + abs(t)) + float(b[slot])
        stored = (int(codes.products[0, slot, 0, 0]) - out.zero_point) * out.scale * float(layer.gain[slot])
        assert abs(stored - normed) <= 0.5001 * out.scale * abs(float(layer.gain[slot]))


def test_products_are_exact_in_the_bits_they_have() -> None:
    every = torch.tensor([-128, -127, -1, 0, 1, 127], dtype=torch.int8)
    chosen = torch.stack((every.repeat_interleave(6), every.repeat(6)))[None, :, :, None]
    i, j = torch.tensor([0]), torch.tensor([1])
    for zero_point in (0, 5, -128, 127):
        found = multiply_pairs(chosen, zero_point, i, j)
        assert found.dtype == (torch.int16 if zero_point == 0 else torch.int32)
        a, b = (chosen[0, k, :, 0].tolist() for k in (0, 1))
        assert found.flatten().tolist() == [(p - zero_point) * (q - zero_point) for p, q in zip(a, b, strict=True)]
        assert int(found.abs().max()) <= (2**14 if zero_point == 0 else 255**2)


def test_equal_scores_take_the_lower_channel_first() -> None:
    ach = float_ach()
    with torch.no_grad():
        ach.scorer.weight.zero_()
    layer = quantized(ach)
    ach.freeze(torch.arange(CS))
    fixed = quantized(ach)
    codes = torch.randint(-128, 128, (4, C, 3, 3), generator=torch.Generator().manual_seed(4), dtype=torch.int8)
    assert torch.equal(layer.integer(codes).products, fixed.integer(codes).products)


def test_range_behind_dysoft_needs_no_data() -> None:
    """Two calibrations that differ a lot give one grid of products, and no input leaves it."""
    ach = float_ach()
    small, large = QuantizedACH(ach), QuantizedACH(ach)
    x = torch.randn(32, C, 6, 6, generator=torch.Generator().manual_seed(5))
    small.calibrate([x * 0.1])
    large.calibrate([x * 10])
    assert small.products_grid == large.products_grid
    assert isinstance(ach.norm, DySoft)
    ratio = (ach.norm.bias / ach.norm.weight).abs()
    assert float(ratio.max()) > 0.3
    assert small.products_grid.scale <= 4 / 255
    with torch.no_grad():
        ach.norm.bias.zero_()
    assert QuantizedACH(ach).norm(torch.tensor(1e9)).max() <= 1
    without = quantized(ach).products_grid
    assert without == Grid(pytest.approx(2 / 255), without.zero_point)
    assert without.zero_point in (-1, 0)


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_reach_everything_but_the_scorer(norm: Norm) -> None:
    layer = quantized(float_ach(norm)).train()
    for quantizer in (layer.quantize_input, layer.quantize_mixed):
        quantizer.learn(True)
    x = torch.randn(8, C, 6, 6, requires_grad=True)
    layer(x).square().mean().backward()
    names = {name for name, p in layer.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    inner = {"alpha", "weight", "bias"} if norm == "dysoft" else {"scale", "shift"}
    wanted = {"weight", "bias", "quantize_input.scale", "quantize_mixed.scale"} | {f"norm.{n}" for n in inner}
    assert names == wanted
    assert x.grad is not None
    assert x.grad.abs().max() > 0


def test_training_lowers_the_loss_and_the_integers_follow() -> None:
    """A few steps towards the float layer's outputs; afterwards both forms still agree, on the new parameters."""
    ach = float_ach(frozen=True)
    layer = quantized(ach).train()
    with torch.no_grad():
        layer.weight.add_(torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(6)) * 0.05)
    x = torch.randn(64, C, 6, 6, generator=torch.Generator().manual_seed(7))
    target = ach(x).detach()
    optimizer = torch.optim.Adam(layer.parameters(), lr=2e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    layer(x)  # the products' range follows the last step
    with torch.no_grad():
        found = codes_of(layer, layer.eval()(x))
    for a, b in zip(found, layer.integer(arithmetic.quantize(x, layer.input_grid)), strict=True):
        assert_nearly_equal(a, b)


def test_state_survives_a_checkpoint() -> None:
    layer = quantized(float_ach(frozen=True))
    fresh = QuantizedACH(float_ach(frozen=True))
    fresh.load_state_dict(layer.state_dict())
    codes = torch.randint(-128, 128, (2, C, 3, 3), generator=torch.Generator().manual_seed(8), dtype=torch.int8)
    for a, b in zip(layer.integer(codes), fresh.eval().integer(codes), strict=True):
        assert torch.equal(a, b)


def use(quantizer: ActivationFakeQuantize, grid: Grid) -> None:
    quantizer.scale.data.fill_(grid.scale)
    quantizer.zero_point = torch.tensor([grid.zero_point], dtype=torch.int32)
    quantizer.disable_observer()
    quantizer.enable_fake_quant()


@pytest.mark.parametrize("selection", ["rank", "static", pytest.param("channel", marks=pytest.mark.slow)])
def test_blocks_of_a_converted_network(
    selection: str,
    make_nano: Callable[..., HadaptiveNet],
    make_graph: Callable[..., GraphModule],
    few_digits: ImageData,
    inputs: Tensor,
) -> None:
    """Every ACH of the nano network on the interpreter's codes: X~ equal, products to a rounding of fp32."""
    graph = make_graph(deploy_graph, selection)
    products = find_products(graph)
    sources = {node.name: str(node.args[0]) for node in graph.graph.nodes if node.args}
    prepared = backend.prepare(graph, make_plan(graph, QuantizeConfig()), "minmax")
    integers = IntegerProgram(backend.convert(backend.calibrate(prepared, [inputs]), few_digits.preprocess))
    for product, (name, ach) in zip(products, make_nano(selection).ach_modules(), strict=True):
        names = [sources[product.mixed], product.mixed, product.normed]
        codes = integers.codes(inputs, names)
        layer = QuantizedACH(ach, symmetric=False).eval()
        for quantizer, tensor in zip(
            (layer.quantize_input, layer.quantize_mixed, layer.quantize_products), names, strict=True
        ):
            use(quantizer, integers.grid(tensor))
        found = layer.integer(codes[names[0]])
        order = torch.arange(found.mixed.shape[1])
        if ach.frozen is not None:  # the deploy form has the chosen channels first
            chosen = ach.frozen.tolist()
            order = torch.tensor([*chosen, *(c for c in order.tolist() if c not in chosen)])
        assert torch.equal(found.mixed[:, order], codes[names[1]]), name
        assert_nearly_equal(found.products[:, rolled_order(ach.cs)], codes[names[2]])
