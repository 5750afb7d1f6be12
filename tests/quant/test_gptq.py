"""Rounding with error feedback: less error than the nearest codes, and codes that the fake-quantizer finds again."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_model
from torch import Tensor
from torch.fx import GraphModule

from hadaptive_q.data.datasets import ImageData
from hadaptive_q.lower.parity import sqnr_db
from hadaptive_q.quant import gptq
from hadaptive_q.quant.backends import torchao_pt2e as backend
from hadaptive_q.quant.gptq import round_rows, round_with_feedback
from hadaptive_q.quant.plan import make_plan
from hadaptive_q.recipe import QuantizeConfig
from hadaptive_q.rewrite.deploy import deploy_graph
from hadaptive_q.rewrite.graph import calls, constant

Q = torch.ops.quantized_decomposed


def nearest(rows: Tensor, scales: Tensor) -> Tensor:
    return (rows / scales[:, None]).round().clamp(-7, 7) * scales[:, None]


def error(rows: Tensor, rounded: Tensor, moments: Tensor) -> Tensor:
    off = (rounded - rows).double()
    return ((off @ moments) * off).sum(1)


def case(rows: int, columns: int, alike: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, their largest scales and moments of inputs that have a share `alike` in common."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64)
    inputs = (1 - alike) * inputs + alike * inputs[:, :1]
    return weight, weight.abs().amax(1) / 7, inputs.T @ inputs / len(inputs)


@pytest.mark.parametrize("columns", [5, 64, 150])
def test_less_error_than_the_nearest_codes(columns: int) -> None:
    weight, largest, moments = case(20, columns, alike=0.5)
    scales, rows = round_rows(weight, largest, moments, 7)
    found, plain = (error(weight, r, moments) for r in (nearest(rows, scales), nearest(weight, largest)))
    assert (found <= plain).all()
    assert float(found.sum()) < 0.6 * float(plain.sum())


def test_of_few_weights_all_but_the_best_codes_are_found() -> None:
    weight, largest, moments = case(12, 3, alike=0.5)
    scales, rows = round_rows(weight, largest, moments, 7)
    found = error(weight, nearest(rows, scales), moments)
    grid = torch.tensor(list(itertools.product(range(-7, 8), repeat=3)), dtype=torch.float32)
    best = torch.stack([error(w, grid * s, moments).min() for w, s in zip(weight, scales, strict=True)])
    assert (found >= best * (1 - 1e-6)).all()
    assert float(found.sum()) < 1.5 * float(best.sum())


def test_inputs_that_have_nothing_in_common_leave_weights_as_they_are() -> None:
    weight, largest, _ = case(20, 30, alike=0.0)
    scales, rows = round_rows(weight, largest, torch.eye(30, dtype=torch.float64), 7)
    assert torch.equal(rows, weight)
    tried = [error(weight, nearest(weight, largest * share), torch.eye(30).double()) for share in gptq.SHARES]
    least = torch.stack(tried).amin(0)
    torch.testing.assert_close(error(weight, nearest(weight, scales), torch.eye(30).double()), least)
    assert len((scales / largest).unique()) > 1, "every channel takes the largest scale"


def test_the_size_of_a_block_changes_nothing_but_the_order_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, largest, moments = case(4, 20, alike=0.5)
    whole = round_rows(weight, largest, moments, 7)
    monkeypatch.setattr(gptq, "BLOCK", 3)
    scales, rows = round_rows(weight, largest, moments, 7)
    assert torch.equal(scales, whole[0])
    torch.testing.assert_close(rows, whole[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dead", ["inputs", "weights"])
def test_channels_of_zeros(dead: str) -> None:
    weight, largest, moments = case(4, 6, alike=0.5)
    if dead == "inputs":
        moments = torch.zeros_like(moments)
    else:
        weight[1] = 0
    scales, rows = round_rows(weight, largest, moments, 7)
    assert torch.equal(rows, weight) if dead == "inputs" else torch.equal(rows[1], weight[1])
    assert (scales > 0).all()
    assert rows.isfinite().all()


@pytest.fixture(scope="module")
def make_calibrated(make_graph: Callable[..., GraphModule], inputs: Tensor) -> Callable[[], backend.Calibrated]:
    """Return a function that gives the nano network with 4-bit weights; no selection that a rounding could flip."""

    def make() -> backend.Calibrated:
        graph = make_graph(deploy_graph, "static")
        plan = make_plan(graph, QuantizeConfig(pointwise_weight_bits=4))
        return backend.calibrate(backend.prepare(graph, plan, "minmax"), [inputs])

    return make


def test_the_network_is_nearer_to_float_and_ships_the_codes_that_were_chosen(
    make_calibrated: Callable[[], backend.Calibrated],
    make_graph: Callable[..., GraphModule],
    inputs: Tensor,
    few_digits: ImageData,
    tmp_path: Path,
) -> None:
    ready = make_calibrated()
    small = {name for name, form in ready.plan.weights.items() if form.bits == 4}
    assert len(small) > 4
    with torch.no_grad():
        wanted, before = make_graph(deploy_graph, "static")(inputs), ready.graph(inputs)
    kept = {name: p.detach().clone() for name, p in ready.graph.named_parameters()}
    round_with_feedback(ready, inputs.split(16))
    with torch.no_grad():
        after = ready.graph(inputs)
    assert sqnr_db(wanted, after) > sqnr_db(wanted, before) + 1

    codes = {}
    for node in ready.graph.graph.nodes:
        if node.name not in ready.plan.weights:
            continue
        weight = constant(ready.graph, node.args[1].args[0])
        assert weight is not None
        assert torch.equal(weight, kept[str(node.args[1].args[0].target)]) != (node.name in small), node
        if node.name in small:
            scale = backend.weight_quantizer(ready.graph, node).calculate_qparams()[0]
            rounded = Q.quantize_per_channel(weight, scale, torch.zeros(len(scale)).long(), 0, -7, 7, torch.int8)
            codes[node.name] = rounded, scale

    save_model(ready.graph, str(tmp_path / "state.safetensors"))
    graph = make_graph(deploy_graph, "static")
    restored = backend.restore(backend.prepare(graph, ready.plan, "minmax"), tmp_path / "state.safetensors")
    for each in (ready, restored):
        program = backend.convert(each, few_digits.preprocess)
        assert torch.equal(program(inputs), after)
        found = {}
        for node in calls(program.graph, *{n.target for n in program.graph.graph.nodes if n.op == "call_function"}):
            reader = next(iter(node.users))
            if node.target == Q.dequantize_per_channel.default and reader.name in small:
                found[reader.name] = tuple(constant(program.graph, a) for a in node.args[:2])
        assert found.keys() == codes.keys()
        for name, (values, scale) in codes.items():
            assert torch.equal(found[name][0], values), name  # type: ignore[arg-type]
            assert torch.equal(found[name][1], scale), name  # type: ignore[arg-type]
