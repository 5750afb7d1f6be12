"""4-bit weights take 4 bits in the file, and the stock runtime computes with them what the interpreter does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from hadaptive_q.data.datasets import ImageData
from hadaptive_q.errors import UserError
from hadaptive_q.lower.executorch import Lowered, lower
from hadaptive_q.lower.parity import sqnr_db
from hadaptive_q.lower.runtime import PteFile
from hadaptive_q.models.config import Preprocess
from hadaptive_q.quant.backends import torchao_pt2e as backend
from hadaptive_q.quant.formats import WeightFormat
from hadaptive_q.quant.interpreter import IntegerProgram
from hadaptive_q.quant.plan import make_plan
from hadaptive_q.quant.program import QuantizedProgram
from hadaptive_q.recipe import QuantizeConfig
from hadaptive_q.rewrite.deploy import deploy_graph
from hadaptive_q.rewrite.graph import constant, trace

Q = torch.ops.quantized_decomposed


def converted(graph: GraphModule, inputs: Tensor, preprocess: Preprocess, bits: int) -> QuantizedProgram:
    plan = make_plan(graph, QuantizeConfig(pointwise_weight_bits=bits))
    prepared = backend.prepare(graph, plan, "minmax")
    return backend.convert(backend.calibrate(prepared, inputs.split(16)), preprocess)


def small_weights(program: QuantizedProgram) -> list[Tensor]:
    """Return the codes of the 4-bit weights."""
    found = []
    for node in program.graph.graph.nodes:
        if node.target == Q.dequantize_per_channel.default and node.args[4:6] == WeightFormat(4).code_range:
            codes = constant(program.graph, node.args[0])
            assert codes is not None
            found.append(codes)
    return found


@pytest.fixture(scope="module")
def small(
    make_graph: Callable[..., GraphModule], few_digits: ImageData, inputs: Tensor
) -> tuple[QuantizedProgram, Lowered]:
    """The nano network with 4-bit weights, and its file."""
    program = converted(make_graph(deploy_graph), inputs, few_digits.preprocess, 4)
    return program, lower(program.export())


def test_codes_are_those_of_the_file(small: tuple[QuantizedProgram, Lowered], inputs: Tensor, tmp_path: Path) -> None:
    program, lowered = small
    assert lowered.coverage.delegates == 1
    assert lowered.coverage.portable_ops == ()
    (tmp_path / "int4.pte").write_bytes(lowered.data)
    file = PteFile(tmp_path / "int4.pte")
    noise = torch.randn(64, *inputs.shape[1:], generator=torch.Generator().manual_seed(0)) * 2
    images = torch.cat((inputs, noise, torch.full((1, *inputs.shape[1:]), 1e4)))
    wanted = torch.cat([file(image[None]) for image in images])
    assert torch.equal(IntegerProgram(program)(images), wanted)
    assert len(wanted.unique()) > 50


def test_two_weights_share_a_byte(small: tuple[QuantizedProgram, Lowered], nano_run: Any) -> None:
    weights = small_weights(small[0])
    assert len(weights) == list(small[0].plan.weights.values()).count(WeightFormat(4, packed=True)) == 10
    assert small_weights(nano_run.program) == []
    assert all(int(codes.abs().max()) == 7 for codes in weights)
    saved = (nano_run.folder / "model.pte").stat().st_size - len(small[1].data)
    packed = sum(codes.numel() // 2 for codes in weights)
    # A convolution's entry in the file is some bytes longer than a Fully Connected's; constants are aligned to 16.
    assert packed - 16 * len(weights) <= saved <= packed + 64 * len(weights)


class Pointwise(nn.Module):
    """Widths that are no multiple of a kernel's tile; three columns are too odd a number for 4 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 22, 1)
        self.act, self.third = nn.Hardswish(), nn.Conv2d(22, 37, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.third(self.act(self.second(self.first(x))))
        return out


PREPROCESS = Preprocess(image_size=8, mean=(0, 0, 0), std=(1, 1, 1), classes=("a", "b"))


def test_every_weight_and_bias_reaches_the_runtime(tmp_path: Path) -> None:
    """One channel has a bias and next to no weights: it must not overflow the accumulators."""
    torch.manual_seed(0)
    model = Pointwise()
    with torch.no_grad():
        assert model.second.bias is not None
        model.second.weight[3], model.second.bias[3] = 1e-9, 1.5
    inputs = torch.randn(32, 3, 8, 8)
    program = converted(trace(model, 8), inputs, PREPROCESS, 4)
    assert [form.bits for form in program.plan.weights.values()] == [8, 4, 4]
    path = tmp_path / "pointwise.pte"
    path.write_bytes(lower(program.export()).data)
    file = PteFile(path)
    found = torch.cat([file(image[None]) for image in inputs])
    assert torch.equal(IntegerProgram(program)(inputs), found)
    with torch.no_grad():
        wanted = model(inputs)
    # Weights of 4 bits leave about 20 dB; a channel that overflowed would drown them.
    assert sqnr_db(wanted, found) > 15


def test_other_convolutions_are_refused() -> None:
    """The plan never asks for one; who does is told, instead of given a file that no runtime loads."""
    graph = trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 2, stride=2)), 8)
    plan = make_plan(graph, QuantizeConfig(pointwise_weight_bits=4))
    assert [form.bits for form in plan.weights.values()] == [8, 8]
    plan.weights.update(dict.fromkeys(plan.weights, WeightFormat(4, packed=True)))
    calibrated = backend.calibrate(backend.prepare(graph, plan, "minmax"), [torch.randn(4, 3, 8, 8)])
    program = backend.convert(calibrated, PREPROCESS)
    with pytest.raises(ValueError, match="not 1x1 with stride 1"):
        lower(program.export())


def test_a_bias_beyond_its_weights_is_refused() -> None:
    """All weights of the layer are next to nothing beside its bias: no file could hold it in their steps."""
    torch.manual_seed(0)
    model = Pointwise()
    with torch.no_grad():
        assert model.second.bias is not None
        model.second.weight *= 1e-6
        model.second.bias += 100
    with pytest.raises(UserError, match=r"second: got a bias of \d+ steps .* 67108864 with 4-bit weights; quantize\."):
        converted(trace(model, 8), torch.randn(4, 3, 8, 8), PREPROCESS, 4)
    assert converted(trace(model, 8), torch.randn(4, 3, 8, 8), PREPROCESS, 8).graph is not None
