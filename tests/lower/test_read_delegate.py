"""What is read off a file's bytes is what lowering put in."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from hadaptive_q.lower.coverage import _kind
from hadaptive_q.lower.executorch import lower
from hadaptive_q.lower.read_delegate import read_operators


def test_operators_are_those_that_were_written(nano_run: Any) -> None:
    operators = read_operators((nano_run.folder / "model.pte").read_bytes())
    found, coverage = Counter(_kind(operator.kind) for operator in operators), nano_run.report.coverage
    for kind, count in Counter([*coverage.int8_ops, *coverage.fp32_ops]).items():
        assert found[kind] == count
    assert found["convert"] == coverage.conversions
    layers = [operator for operator in operators if "filter" in operator.types]
    assert {layer.types["input1"] for layer in layers} >= {"qint8"}
    assert sum(layer.types["filter"] == "qcint8" for layer in layers) == len(nano_run.program.plan.weights)


class Clamped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()


def test_a_clamp_without_a_bound_is_read() -> None:
    program = torch.export.export(Clamped().eval(), (torch.zeros(1, 3, 8, 8),))
    assert "XNNConv2d" in [operator.kind for operator in read_operators(lower(program).data)]
