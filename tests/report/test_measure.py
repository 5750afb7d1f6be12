"""Every tensor measured alone: only the layer at fault shows a fault."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from hadaptive_q.quant.program import QuantizedProgram
from hadaptive_q.report.measure import gain, measure_layers, measure_weights
from hadaptive_q.report.record import LayerRecord
from hadaptive_q.rewrite.deploy import deploy_graph
from hadaptive_q.rewrite.graph import aten, constant, module_path

LAYER = "blocks.1.projection.conv"


@pytest.fixture(scope="module")
def measured(
    make_program: Callable[[str], QuantizedProgram], make_graph: Callable[..., GraphModule], inputs: Tensor
) -> Callable[[QuantizedProgram | None], dict[str, LayerRecord]]:
    def measure(program: QuantizedProgram | None = None) -> dict[str, LayerRecord]:
        deploy = make_graph(deploy_graph, "channel")
        program = program or make_program("channel")
        weights = [
            LayerRecord(
                name=f"{w.name}.weight",
                origin=w.layer,
                sqnr_db=w.sqnr_db,
                local_sqnr_db=w.sqnr_db,
                gain=w.gain,
                low=0,
                high=0,
                scale=1,
            )
            for w in measure_weights(deploy, program)
        ]
        return {layer.name: layer for layer in [*measure_layers(deploy, program, inputs), *weights]}

    return measure


def faulty(program: QuantizedProgram, change: Callable[[Tensor, Tensor], object]) -> QuantizedProgram:
    """Return a copy of `program` with `change` applied to the scales of the layer's weights and to its bias."""
    graph = copy.deepcopy(program.graph)
    (conv,) = (n for n in graph.graph.nodes if n.target == aten.conv2d.default and module_path(n) == LAYER)
    scales, bias = constant(graph, conv.args[1].args[1]), constant(graph, conv.args[2])
    assert scales is not None
    assert bias is not None
    change(scales.data, bias.data)
    return QuantizedProgram(graph, program.plan, program.preprocess)


def _finite(layer: LayerRecord) -> float:
    assert layer.local_sqnr_db is not None
    return min(layer.local_sqnr_db, 100.0)


def test_a_layer_alone_has_its_own_rounding_only(measured: Callable[..., dict[str, LayerRecord]]) -> None:
    for layer in measured().values():
        assert layer.gain is not None
        assert layer.local_sqnr_db is not None
        # 8 bits for weights and results each: some 40 dB, and a slope of 1 but for single per mille.
        assert abs(layer.gain - 1) < 0.004, layer
        assert layer.local_sqnr_db > 25, layer
        assert layer.local_sqnr_db > layer.sqnr_db - 1 or layer.sqnr_db > 40, layer


@pytest.mark.parametrize("fault", ["scale", "bias"])
def test_only_the_layer_at_fault_shows_it(
    measured: Callable[..., dict[str, LayerRecord]], make_program: Callable[[str], QuantizedProgram], fault: str
) -> None:
    def change(scales: Tensor, bias: Tensor) -> None:
        scales.mul_(1.01) if fault == "scale" else bias.zero_()

    before, after = measured(), measured(faulty(make_program("channel"), change))
    gains = {name: after[name].gain - before[name].gain for name in before}  # type: ignore[operator]
    falls = {name: _finite(before[name]) - _finite(after[name]) for name in before}
    figures, least = (gains, 0.008) if fault == "scale" else (falls, 10.0)
    worst = max(figures, key=lambda name: abs(figures[name]))
    assert after[worst].origin == LAYER
    assert figures[worst] > least
    # Other images, as it were, for the layers behind it: what they round changes a little.
    assert all(abs(figure) < figures[worst] / 2 for name, figure in figures.items() if after[name].origin != LAYER)


def test_gain_is_the_slope_within_channels() -> None:
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    offsets = torch.tensor([1.0, -2.0, 30.0])[:, None, None]
    assert gain(x, 1.01 * x + offsets) == pytest.approx(1.01)
    assert gain(x[:, :, 0, 0], 0.5 * x[:, :, 0, 0]) == pytest.approx(0.5)
    assert gain(torch.ones(2, 3), torch.zeros(2, 3)) == 1.0
