"""Slots of BatchNorm-type products share one int8 scale: equal in float, and closer to float in int8."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from hadaptive_q.lower.parity import sqnr_db
from hadaptive_q.models.ach import ACH
from hadaptive_q.models.blocks import Bottleneck
from hadaptive_q.models.checkpoint import load_model
from hadaptive_q.models.config import ACHConfig, Norm
from hadaptive_q.models.cross_hadamard import pair_indices
from hadaptive_q.models.hadaptive_net import HadaptiveNet
from hadaptive_q.quant.observers import RangeObserver
from hadaptive_q.report.measure import record
from hadaptive_q.rewrite.deploy import REWRITES, deploy_graph
from hadaptive_q.rewrite.equalise_products import UNEVEN, equalise_products, even_gain, operand_factors
from hadaptive_q.rewrite.graph import aten, calls, trace
from hadaptive_q.rewrite.products import find_products

Check = Callable[[Tensor, Tensor], None]
BEFORE = REWRITES[: REWRITES.index(equalise_products)]
AFTER = REWRITES[REWRITES.index(equalise_products) + 1 :]


class Net(nn.Module):
    """An ACH bottleneck whose norms have seen data; `spread` is the deviation of log gamma."""

    def __init__(self, channels: int, cs: int, k: int, norm: Norm = "batch_norm", spread: float = 0.5) -> None:
        super().__init__()
        torch.manual_seed(cs)
        self.first = nn.Conv2d(3, channels, 1)
        self.block = Bottleneck(channels, ACHConfig(channels=channels, cs=cs, k=k, norm=norm), "rank")
        for norm_module in (m for m in self.modules() if isinstance(m, nn.BatchNorm2d)):
            nn.init.normal_(norm_module.bias, std=0.3)
            norm_module.momentum = None
        ach = self.block.expansion
        assert isinstance(ach, ACH)
        ach.noise.zero_()
        with torch.no_grad():
            weight = ach.norm.weight
            assert isinstance(weight, Tensor)
            weight.copy_((torch.randn_like(weight) * spread).exp() * torch.randn_like(weight).sign())
            self.train()
            for _ in range(8):
                self(torch.randn(16, 3, 8, 8))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.first(x))


def images(count: int = 8) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def graphs(model: nn.Module) -> tuple[GraphModule, GraphModule]:
    """Return `model` in deploy form without and with equalisation."""
    found = []
    for equalised in (False, True):
        graph = trace(model, 8)
        for rewrite in (*BEFORE, *((equalise_products,) if equalised else ()), *AFTER):
            rewrite(graph)
        found.append(graph)
    return found[0], found[1]


@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0])
@pytest.mark.parametrize(("channels", "cs", "k"), [(8, 2, 3), (9, 3, 1), (8, 8, 3), (12, 7, 5), (10, 4, 7)])
def test_any_ach_stays_equal(channels: int, cs: int, k: int, spread: float, assert_float_equal: Check) -> None:
    model = Net(channels, cs, k, spread=spread)
    graph = trace(model, 8)
    for rewrite in BEFORE:
        rewrite(graph)
    assert equalise_products(graph) == 1
    with torch.no_grad():
        assert_float_equal(graph(images()), model(images()))
        for rewrite in AFTER:
            rewrite(graph)
        assert_float_equal(graph(images()), model(images()))
    assert equalise_products(graph) == 0


@pytest.mark.parametrize("selection", ["rank", "channel", "static"])
def test_the_nano_network(
    selection: str,
    make_nano: Callable[..., HadaptiveNet],
    make_graph: Callable[..., GraphModule],
    inputs: Tensor,
    assert_float_equal: Check,
) -> None:
    graph, model = make_graph(trace, selection), make_nano(selection)
    for rewrite in BEFORE:
        rewrite(graph)
    assert equalise_products(graph) == sum(isinstance(a.norm, nn.BatchNorm2d) for _, a in model.ach_modules()) == 1
    with torch.no_grad():
        assert_float_equal(graph(inputs), model(inputs))


def test_the_authors_network(golden: Path) -> None:
    model, vectors = load_model(golden / "nano_conductor.pt"), np.load(golden / "nano.npz")
    x, y = torch.from_numpy(vectors["x"]), torch.from_numpy(vectors["y"])
    graph = trace(model, 64)
    for rewrite in BEFORE:
        rewrite(graph)
    assert equalise_products(graph) > 0
    with torch.no_grad():
        torch.testing.assert_close(graph(x), y, rtol=0, atol=1e-4)  # as the vectors were published


def test_slots_that_are_dead_or_constant(assert_float_equal: Check) -> None:
    model = Net(8, 4, 3)
    ach = model.block.expansion
    assert isinstance(ach, ACH)
    assert isinstance(ach.norm, nn.BatchNorm2d)
    with torch.no_grad():
        ach.norm.weight[:3] = 0
        ach.norm.bias[1] = 0
        ach.norm.weight[3] = 1e-12
        ach.norm.bias[3] = 5.0
    _, graph = graphs(model)
    with torch.no_grad():
        assert_float_equal(graph(images()), model(images()))


def test_a_norm_without_parameters(assert_float_equal: Check) -> None:
    model = Net(8, 4, 3)
    ach = model.block.expansion
    assert isinstance(ach, ACH)
    with torch.no_grad():
        plain = nn.BatchNorm2d(6, affine=False)
        plain.running_var.uniform_(0.1, 5)  # type: ignore[union-attr]
    ach.norm = plain.eval()
    graph = deploy_graph(model, 8)
    with torch.no_grad():
        assert_float_equal(graph(images()), model(images()))


def multiplications(graph: GraphModule) -> int:
    """Count the multiplications by a constant per slot."""
    found = 0
    for node in calls(graph, aten.mul.Tensor):
        values = [a for a in node.args if getattr(a, "op", "") == "get_attr"]
        found += any(len(v.meta["val"].shape) == 4 and v.meta["val"].shape[1] == 28 for v in values)  # type: ignore[union-attr]
    return found


def test_the_multiplication_moves_to_the_operands() -> None:
    plain, equalised = graphs(Net(8, 8, 3, spread=0.3))
    assert (multiplications(plain), multiplications(equalised)) == (1, 0)
    assert len(list(calls(equalised, aten.mul.Tensor))) == len(list(calls(plain, aten.mul.Tensor)))


@pytest.mark.parametrize("cs", range(2, 37))
def test_factors_of_a_product_are_found(cs: int) -> None:
    a = torch.rand(cs, generator=torch.Generator().manual_seed(cs)) * 3 + 0.01
    i, j = pair_indices(cs)
    found = operand_factors(a[i] * a[j], cs)
    assert found is not None
    torch.testing.assert_close(found[i] * found[j], a[i] * a[j], rtol=1e-5, atol=0)


def test_slopes_that_are_no_product_have_none() -> None:
    slope = torch.ones(6)
    slope[2] = UNEVEN**4
    assert operand_factors(slope, 4) is None
    assert operand_factors(torch.tensor([1.0, 0.0, 1.0]), 3) is None


def test_gains_have_the_sign_of_gamma_and_are_never_zero() -> None:
    gain = even_gain(torch.tensor([1.0, -1.0, 0.0, 0.0]), torch.tensor([0.0, 2.0, -3.0, 0.0]))
    assert gain.tolist() == [8.0, -10.0, 3.0, 2**-10]


def stored_in_int8(graph: GraphModule) -> Tensor:
    """Return the products of `graph` as its depthwise convolutions see them, stored in one int8 scale."""
    (product,) = find_products(graph)
    values = record(graph, images(32), {product.normed})[product.normed]
    observer = RangeObserver("mse", 256)
    observer.watch(values)
    low, high = observer.range()
    scale = (high - low) / 255
    zero_point = int((-128 - low / scale).round())
    stored = torch.fake_quantize_per_tensor_affine(values, float(scale), zero_point, -128, 127)
    return torch.stack([values, stored])


@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
def test_int8_products_gain(spread: float) -> None:
    """SQNR of every slot as its own filter sees it, in the mean over slots: gains cancel in it."""

    def of_slots(graph: GraphModule) -> float:
        values, stored = stored_in_int8(graph)
        return sum(sqnr_db(values[:, p], stored[:, p]) for p in range(values.shape[1])) / values.shape[1]

    plain, equalised = graphs(Net(16, 12, 3, spread=spread))
    assert of_slots(equalised) > 30
    assert of_slots(equalised) > of_slots(plain) + 3 * spread
