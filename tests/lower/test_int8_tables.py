"""Element-wise functions stay on codes inside the delegate; the stock runtime computes them to within one code."""

from __future__ import annotations

from pathlib import Path

import pytest
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
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Conv2d(3, 8, 3), act, nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(self.act(self.first(x)))
        return out


@pytest.mark.parametrize(
    ("act", "name"), [(nn.Hardswish(), "hardswish"), (nn.GELU(), "gelu"), (nn.Sigmoid(), "sigmoid")]
)
def test_functions_are_int8_in_the_file(act: nn.Module, name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph = trace(ConvAct(act), 8)
    inputs = torch.randn(16, 3, 8, 8)
    prepared = backend.prepare(graph, make_plan(graph, QuantizeConfig()), "minmax")
    calibrated = backend.calibrate(prepared, [inputs])
    preprocess = Preprocess(image_size=8, mean=(0, 0, 0), std=(1, 1, 1), classes=("a", "b"))
    program = backend.convert(calibrated, preprocess)

    lowered = lower(program.export())
    assert lowered.coverage.delegates == 1
    assert lowered.coverage.fp32_ops == ()
    assert name in lowered.coverage.int8_ops

    (tmp_path / "act.pte").write_bytes(lowered.data)
    file = PteFile(tmp_path / "act.pte")
    found = torch.cat([file(image[None]) for image in inputs])
    parity = compare(program(inputs), found, output_scale(program.graph))
    # Codes agree up to the order in which two roundings meet a tie.
    assert parity.max_codes <= 1
    assert parity.changed_fraction <= 0.01
