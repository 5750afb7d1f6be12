"""Hardswish stays on codes inside the delegate, and the stock runtime computes it to within one code."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from hadaptive_q.lower.executorch import lower
from hadaptive_q.lower.parity import compare, output_scale
from hadaptive_q.lower.runtime import PteFile
from hadaptive_q.models.config import Preprocess
from hadaptive_q.quant.backends import torchao_pt2e as backend
from hadaptive_q.quant.plan import make_plan
from hadaptive_q.recipe import QuantizeConfig
from hadaptive_q.rewrite.graph import trace


class ConvAct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Conv2d(3, 8, 3), nn.Hardswish(), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(self.act(self.first(x)))
        return out


def test_hardswish_is_int8_in_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph = trace(ConvAct(), 8)
    inputs = torch.randn(16, 3, 8, 8)
    prepared = backend.prepare(graph, make_plan(graph, QuantizeConfig()), "minmax")
    calibrated = backend.calibrate(prepared, [inputs])
    preprocess = Preprocess(image_size=8, mean=(0, 0, 0), std=(1, 1, 1), classes=("a", "b"))
    program = backend.convert(calibrated, preprocess)

    lowered = lower(program.export())
    assert lowered.coverage.delegates == 1
    assert "hardswish" not in lowered.coverage.fp32_ops
    assert "conv2d" not in lowered.coverage.fp32_ops
    assert "hardswish" in lowered.coverage.int8_ops

    (tmp_path / "act.pte").write_bytes(lowered.data)
    file = PteFile(tmp_path / "act.pte")
    found = torch.cat([file(image[None]) for image in inputs])
    parity = compare(program(inputs), found, output_scale(program.graph))
    # Codes agree up to the order in which two roundings meet a tie.
    assert parity.max_codes <= 1
    assert parity.changed_fraction <= 0.01
