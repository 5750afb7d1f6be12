"""What is read off a file's bytes is what lowering put in."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from hadaptive_q.lower.coverage import _kind
from hadaptive_q.lower.executorch import lower
from hadaptive_q.lower.read_delegate import read_operators
from hadaptive_q.quant.program import export_graph


def test_operators_are_those_that_were_written(nano_run: Any) -> None:
    operators = read_operators((nano_run.folder / "model.pte").read_bytes())
    found, coverage = Counter(_kind(operator.kind) for operator in operators), nano_run.report.coverage
    for kind, count in Counter([*coverage.int8_ops, *coverage.fp32_ops]).items():
        assert found[kind] == count
    assert found["convert"] == coverage.conversions
    layers = [operator for operator in operators if "filter" in operator.types]
    assert {layer.types["input1"] for layer in layers} >= {"qint8"}
    assert sum(layer.types["filter"] == "qcint8" for layer in layers) == len(nano_run.program.plan.weights)


def test_a_clamp_without_an_upper_end_is_read() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    model(torch.zeros(1, 3, 8, 8))
    operators = read_operators(lower(export_graph(model.eval(), 8)).data)
    assert [operator.kind for operator in operators if "filter" in operator.types] == ["XNNConv2d", "XNNFullyConnected"]
