"""A clamp behind an int8 addition or product is part of it with our configurations, an operator in float without."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from executorch.backends.xnnpack.partition.config.generic_node_configs import AddConfig, MulConfig
from torch import Tensor, nn

from hadaptive_q.lower import executorch
from hadaptive_q.lower.delegate import Delegate
from hadaptive_q.lower.fused_clamps import CLAMPED
from hadaptive_q.lower.runtime import PteFile
from hadaptive_q.quant import arithmetic
from hadaptive_q.quant.arithmetic import Grid

Q = torch.ops.quantized_decomposed
ONE, OTHER, SUM = Grid(0.0625, -10), Grid(0.03125, 5), Grid(0.0625, -128)
EVERY = torch.arange(-128, 128, dtype=torch.int8)


def through(x: Tensor, grid: Grid) -> Tensor:
    settings = (grid.scale, grid.zero_point, -128, 127, torch.int8)
    return Q.dequantize_per_tensor(Q.quantize_per_tensor(x, *settings), *settings)  # type: ignore[no-any-return]


class Clamped(nn.Module):
    """relu6(a + b) and relu(a b), stored in codes of 0.0625 from 0 up: 6 is code -32, and sums reach beyond it."""

    def forward(self, x: Tensor) -> Tensor:
        one, other = through(x[:, :1], ONE), through(x[:, 1:], OTHER)
        total = through(nn.functional.relu6(one + other), SUM)
        return torch.cat((total, through(nn.functional.relu(one * other), SUM)), 1)


def lowered(stock: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[executorch.Lowered, list[Delegate], Tensor]:
    """Return the file, its delegates, and all pairs of codes as one input."""
    seen: list[Delegate] = []
    tidy = executorch.tidy_delegate

    def kept(delegate: Delegate) -> Any:
        seen.append(delegate)
        return tidy(delegate)

    monkeypatch.setattr(executorch, "tidy_delegate", kept)
    if stock:
        instead = {ours: given for given, ours in CLAMPED.items()}
        monkeypatch.setattr(executorch, "_CONFIGS", [instead.get(config, config) for config in executorch._CONFIGS])
    pairs = (EVERY.repeat_interleave(256), EVERY.repeat(256))
    x = torch.stack([arithmetic.dequantize(c, grid) for c, grid in zip(pairs, (ONE, OTHER), strict=True)])
    x = x.reshape(1, 2, 256, 256)
    return executorch.lower(torch.export.export(Clamped().eval(), (x,))), seen, x


def operators(delegates: list[Delegate]) -> list[tuple[str, str, float]]:
    """Return what every operator but concatenations and conversions stores, and up to which value."""
    return [
        (node.kind, delegate.values[node.output].datatype, float(bounds.output_max) if bounds else math.inf)
        for delegate in delegates
        for node in delegate.nodes
        for bounds in [node.raw.output_min_max]
        if node.kind in ("XNNAdd", "XNNMultiply", "XNNClamp")
    ]


def test_the_clamp_is_part_of_the_operator_and_codes_are_the_definitions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file, delegates, x = lowered(False, monkeypatch)
    assert operators(delegates) == [("XNNAdd", "qint8", 6.0), ("XNNMultiply", "qint8", math.inf)]
    assert file.coverage.fp32_ops == ()
    (tmp_path / "file.pte").write_bytes(file.data)
    total, product = PteFile(tmp_path / "file.pte")(x).unbind(1)
    first, second = EVERY.repeat_interleave(256), EVERY.repeat(256)
    cut = arithmetic.code_of(6.0, SUM)
    assert cut == -32
    wanted = arithmetic.add(first, second, ONE, OTHER, SUM).clamp(-128, cut)
    assert torch.equal(total.flatten(), arithmetic.dequantize(wanted, SUM))
    assert (wanted == cut).sum() > 1000, "nothing is clamped"
    wanted = arithmetic.multiply(first, second, ONE, OTHER, SUM)
    assert torch.equal(product.flatten(), arithmetic.dequantize(wanted, SUM))


def test_stock_configurations_compute_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the exception is for: should a later runtime's partitioner know the clamps, this fails, and it may go."""
    file, delegates, _ = lowered(True, monkeypatch)
    assert operators(delegates) == [("XNNAdd", "fp32", 6.0), ("XNNMultiply", "fp32", math.inf)]
    assert file.coverage.fp32_ops == ("add", "multiply")


def test_only_additions_and_multiplications_are_replaced() -> None:
    assert set(CLAMPED) == {AddConfig, MulConfig}
    for stock, ours in CLAMPED.items():
        assert issubclass(ours, stock)
        assert ours().target_name == stock().target_name
