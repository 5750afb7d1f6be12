"""The coverage of a written file: precisions, what moves data only, and where the bytes are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hadaptive_q.lower.coverage import Coverage
from hadaptive_q.lower.executorch import Lowered
from hadaptive_q.quant.program import QuantizedProgram
from hadaptive_q.rewrite.graph import calls, constant


@pytest.fixture(scope="module", params=["rank", "static"])
def covered(
    request: pytest.FixtureRequest,
    make_program: Callable[[str], QuantizedProgram],
    make_file: Callable[[str], Lowered],
) -> tuple[Coverage, QuantizedProgram, int]:
    lowered = make_file(request.param)
    return lowered.coverage, make_program(request.param), len(lowered.data)


def test_everything_runs_in_one_delegate(covered: tuple[Coverage, QuantizedProgram, int]) -> None:
    coverage, program, _ = covered
    assert coverage.delegates == 1
    assert coverage.portable_ops == ()
    # Every layer is int8; what is float are products, their norm and, per sample, the choice.
    assert {"conv2d", "hardswish", "fully_connected"} <= set(coverage.int8_ops)
    assert "conv2d" not in coverage.fp32_ops
    assert coverage.fp32_ops.count("div") == sum("div" in str(node.target) for node in program.graph.graph.nodes)
    selects = any("bmm" in str(node.target) for node in program.graph.graph.nodes)
    assert ("batch_matrix_multiply" in coverage.fp32_ops) == selects


def test_bytes_of_layers_are_those_of_their_weights(covered: tuple[Coverage, QuantizedProgram, int]) -> None:
    coverage, program, size = covered
    ops = torch.ops.quantized_decomposed
    codes = sum(
        weight.numel()
        for node in calls(program.graph, ops.dequantize_per_channel.default)
        if (weight := constant(program.graph, node.args[0])) is not None
    )
    layers = {layer.layer: layer for layer in coverage.layers}
    quantized = [layer for layer in coverage.layers if layer.scales]
    assert sum(layer.weights for layer in quantized) == codes
    assert layers["head.hidden"].biases == layers["head.hidden"].scales > 0, "an int32 and a float32 per channel"
    assert sum(layer.total for layer in coverage.layers) < size
    totals = [layer.total for layer in coverage.layers]
    assert totals == sorted(totals, reverse=True)
    assert "" not in layers, "every constant belongs to a layer"


def test_counts_of_what_only_moves_data(covered: tuple[Coverage, QuantizedProgram, int]) -> None:
    coverage, _, _ = covered
    assert coverage.conversions > 0
    assert coverage.copies > 0
    assert coverage.transposes > 0
