"""4-bit weights on emulated ARM64: the codes of this machine everywhere, dot products where the core has them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hadaptive_q.arm.cores import CORES
from hadaptive_q.arm.count import count_instructions, run_on
from hadaptive_q.arm.operators import count_operators
from hadaptive_q.cli import bench
from hadaptive_q.lower.cpu_features import wanted_arm_features
from hadaptive_q.lower.executorch import lower
from hadaptive_q.models.config import Preprocess
from hadaptive_q.quant.backends import torchao_pt2e as backend
from hadaptive_q.quant.formats import WeightFormat
from hadaptive_q.quant.interpreter import IntegerProgram
from hadaptive_q.quant.plan import make_plan
from hadaptive_q.quant.program import QuantizedProgram
from hadaptive_q.recipe import QuantizeConfig
from hadaptive_q.rewrite.graph import trace


class Small(nn.Module):
    """A pointwise convolution of three columns, which keeps 8 bits, one of 4 bits, and a Linear of 4 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 14, 1), nn.Conv2d(14, 26, 1), nn.Linear(26, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(nn.functional.hardswish(self.second(self.first(x))).mean((-1, -2)))
        return out


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, QuantizedProgram]]:
    preprocess = Preprocess(image_size=8, mean=(0, 0, 0), std=(1, 1, 1), classes=tuple("abcdefghij"))
    found = {}
    for bits in (4, 8):
        torch.manual_seed(0)
        graph = trace(Small(), 8)
        prepared = backend.prepare(graph, make_plan(graph, QuantizeConfig(pointwise_weight_bits=bits)), "minmax")
        program = backend.convert(backend.calibrate(prepared, [torch.randn(16, 3, 8, 8)]), preprocess)
        path = tmp_path_factory.mktemp("int4") / f"{bits}.pte"
        path.write_bytes(lower(program.export()).data)
        found[bits] = path, program
    return found


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("core", CORES)
def test_outputs_are_exact_on_every_core(core: str, files: dict[int, tuple[Path, QuantizedProgram]]) -> None:
    path, program = files[4]
    assert list(program.plan.weights.values()).count(WeightFormat(4, packed=True)) == 2
    inputs = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2
    assert np.array_equal(run_on(path, core, inputs), IntegerProgram(program)(inputs).numpy())
    names = [operator.name for operator in count_operators(path, core)]
    assert sum("QC4W" in name for name in names) == 2


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("core", CORES)
def test_a_core_without_what_is_wanted_is_slow(core: str, files: dict[int, tuple[Path, QuantizedProgram]]) -> None:
    path, _ = files[4]
    small, whole = count_instructions(path, core), count_instructions(files[8][0], core)
    has_all = not CORES[core].lacks(wanted_arm_features(path.read_bytes()))
    assert (small.by_class["dot"] > 0) == has_all
    assert (small.total < 1.3 * whole.total) == has_all


@pytest.mark.usefixtures("emulator")
def test_bench_says_what_a_core_lacks(
    files: dict[int, tuple[Path, QuantizedProgram]], capsys: pytest.CaptureFixture[str]
) -> None:
    bench([files[4][0]], ["cortex-a53", "cortex-a76"], as_json=True)
    (result,) = json.loads(capsys.readouterr().out)
    assert result["wanted_arm_features"] == ["asimddp"]
    assert {core: cost["missing_features"] for core, cost in result["arm"].items()} == {
        "cortex-a53": ["asimddp"],
        "cortex-a76": [],
    }
    bench([files[4][0], files[8][0]], ["cortex-a53"])
    assert capsys.readouterr().out.count("wants asimddp, which cortex-a53 lacks") == 1
