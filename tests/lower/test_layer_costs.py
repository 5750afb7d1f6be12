"""What single layers add to the instructions makes up what the files differ in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from hadaptive_q.arm.build import missing
from hadaptive_q.arm.count import count_instructions
from hadaptive_q.lower.executorch import lower
from hadaptive_q.lower.layer_costs import instructions_added
from hadaptive_q.models.config import Preprocess
from hadaptive_q.quant.backends import torchao_pt2e as backend
from hadaptive_q.quant.plan import make_plan
from hadaptive_q.recipe import Bits, QuantizeConfig
from hadaptive_q.rewrite.graph import trace

PREPROCESS = Preprocess(image_size=8, mean=(0, 0, 0), std=(1, 1, 1), classes=("a", "b"))


def written(path: Path, layers: dict[str, Bits]) -> Path:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Conv2d(3, 32, 1), nn.Conv2d(32, 64, 1), nn.Hardswish(), nn.Conv2d(64, 16, 1))
    graph = trace(wide, 8)
    prepared = backend.prepare(graph, make_plan(graph, QuantizeConfig(layers=layers)), "minmax")
    program = backend.convert(backend.calibrate(prepared, [torch.randn(16, 3, 8, 8)]), PREPROCESS)
    path.write_bytes(lower(program.export()).data)
    return path


@pytest.mark.skipif(bool(missing()), reason=missing() or "emulator present")
@pytest.mark.parametrize("core", ["cortex-a53", "cortex-a76"])
def test_single_costs_make_up_the_difference(tmp_path: Path, core: str) -> None:
    eight, both = written(tmp_path / "8.pte", {}), written(tmp_path / "4.pte", {"1": 4, "3": 4})
    second = written(tmp_path / "second.pte", {"3": 4})
    first_added, second_added = instructions_added(eight, both, core)
    assert instructions_added(eight, second, core) == [second_added], "a layer's cost is its own"
    assert instructions_added(eight, eight, core) == []
    whole, base = count_instructions(both, core).total, count_instructions(eight, core).total
    # Both operators' preparation is not theirs: a few hundred instructions.
    assert first_added + second_added == pytest.approx(whole - base, abs=2000)
    assert (second_added > base / 4) == (core == "cortex-a53"), "a scalar fallback, or dot products"
