"""Scales of products end where x86-64 and ARM64 agree on every pair of codes, one last bit at a time."""

from __future__ import annotations

import pytest
import torch

from hadaptive_q.models.families import create_model
from hadaptive_q.quant import arithmetic
from hadaptive_q.quant.arithmetic import Grid
from hadaptive_q.quant.backends import torchao_pt2e as backend
from hadaptive_q.quant.plan import make_plan
from hadaptive_q.quant.portable_products import every_pair, portable_scale, settle_products
from hadaptive_q.quant.sites import quantizer_of
from hadaptive_q.recipe import QuantizeConfig
from hadaptive_q.rewrite.deploy import deploy_graph
from hadaptive_q.rewrite.graph import aten, calls

PAIRS = every_pair()


def differing(a: Grid, b: Grid, out: Grid) -> int:
    """Return on how many pairs of codes the two kinds of kernels differ."""
    return int((arithmetic.multiply(*PAIRS, a, b, out) != arithmetic.multiply_arm64(*PAIRS, a, b, out)).sum())


def test_all_pairs_are_there_once() -> None:
    assert len({(int(a), int(b)) for a, b in zip(*PAIRS, strict=True)}) == 65536


def test_halves_round_both_ways() -> None:
    half = Grid(0.5, 0)
    odd, one = torch.tensor([-3, -1, 1, 3], dtype=torch.int8), torch.ones(4, dtype=torch.int8)
    assert arithmetic.multiply(odd, one, half, Grid(1.0, 0), Grid(1.0, 0)).tolist() == [-2, 0, 0, 2]
    assert arithmetic.multiply_arm64(odd, one, half, Grid(1.0, 0), Grid(1.0, 0)).tolist() == [-1, 0, 1, 2]


@pytest.mark.parametrize("ratio", [2.0**-16, 2.0**-15.5, 0.3, 1.0, 100.0])
def test_both_kernels_are_the_product_to_a_code(ratio: float) -> None:
    grids = Grid(ratio, -7), Grid(1.0, 100), Grid(1.0, 3)
    exact = (PAIRS[0].double() + 7) * (PAIRS[1].double() - 100) * float(torch.tensor(ratio)) + 3
    for kernel in (arithmetic.multiply, arithmetic.multiply_arm64):
        error = kernel(*PAIRS, *grids).double() - exact.clamp(-128, 127)
        assert error.abs().max() <= 0.5 + 2**-14


def test_a_scale_moves_by_its_last_bits_until_all_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    moved = 0
    for _ in range(20):
        scales = (torch.rand(3, generator=generator) * 0.05 + 0.001).tolist()
        zeros = torch.randint(-128, 128, (3,), generator=generator).tolist()
        a, b, out = (Grid(scale, zero) for scale, zero in zip(scales, zeros, strict=True))
        out = Grid(float(torch.tensor(scales[0] * scales[1] * 100)), out.zero_point)
        scale = portable_scale(a, b, out)
        assert differing(a, b, Grid(scale, out.zero_point)) == 0
        assert 0 <= scale / out.scale - 1 < 1e-5
        moved += scale != out.scale
        assert (scale == out.scale) == (differing(a, b, out) == 0)
    assert 0 < moved < 20


def test_exact_halves_are_left() -> None:
    a, b, out = Grid(0.5, 0), Grid(0.25, 0), Grid(0.25, 0)
    assert differing(a, b, out) > 0
    assert 0.25 < portable_scale(a, b, out) < 0.2501


def test_no_scale_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hadaptive_q.quant.portable_products.ATTEMPTS", 1)
    with pytest.raises(ArithmeticError, match="no portable scale"):
        portable_scale(Grid(0.5, 0), Grid(0.25, 0), Grid(0.25, 0))


def test_a_calibrated_network_is_portable_in_every_product() -> None:
    torch.manual_seed(0)
    model, x = create_model("rcvit_nano", 5), torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        model.train()(x)
    graph = deploy_graph(model.eval(), 32)
    ready = backend.calibrate(backend.prepare(graph, make_plan(graph, QuantizeConfig()), "minmax"), [x])
    products = list(calls(ready.graph, aten.mul.Tensor))
    assert len(products) == 10
    assert settle_products(ready.graph) == 0, "calibration settled them"
    # Moved off, each comes back to where all pairs agree.
    first = quantizer_of(ready.graph, products[0].name)
    with torch.no_grad():
        operands = [ready.graph.get_submodule(str(node.target)) for node in products[0].all_input_nodes]
        first.scale.fill_(float(operands[0].scale) * float(operands[1].scale) * 2)  # type: ignore[arg-type, operator]
    assert settle_products(ready.graph) >= 1
    assert settle_products(ready.graph) == 0
