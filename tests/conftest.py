"""Shared fixtures: golden vectors, small data, a nano network that has learnt it, its deploy graph."""

from __future__ import annotations

import copy
import functools
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from hadaptive_q import pipeline
from hadaptive_q.data.datasets import ImageData, TensorSplit
from hadaptive_q.data.sources import open_data
from hadaptive_q.data.transforms import normalise
from hadaptive_q.lower.executorch import Lowered, lower
from hadaptive_q.models.ach import DySoft
from hadaptive_q.models.checkpoint import save_model
from hadaptive_q.models.config import InputName
from hadaptive_q.models.families import create_model
from hadaptive_q.models.hadaptive_net import HadaptiveNet
from hadaptive_q.models.pixels import take_pixels
from hadaptive_q.pipeline import quantized_program
from hadaptive_q.quant.backends import torchao_pt2e as backend
from hadaptive_q.quant.plan import make_plan
from hadaptive_q.quant.program import QuantizedProgram
from hadaptive_q.recipe import Bits, QuantizeConfig, load_recipe
from hadaptive_q.report.record import Report
from hadaptive_q.rewrite.deploy import deploy_graph
from hadaptive_q.rewrite.freeze_selection import freeze_selection
from hadaptive_q.rewrite.graph import trace

# Before a test imports a library that reads them: a run has tables of its own, and nothing asks the network.
_TABLES = tempfile.TemporaryDirectory(prefix="hadaptive-q-tests-")
os.environ["HF_HOME"] = _TABLES.name
os.environ["HF_HUB_OFFLINE"] = "1"
# Tensors here are tiny: threads that wait for each other on a busy machine took 170 times as long as the work.
torch.set_num_threads(1)

# The same examples on every run; HYPOTHESIS_PROFILE=many looks for others.
hypothesis.settings.register_profile("few", derandomize=True, deadline=None, database=None, max_examples=60)
hypothesis.settings.register_profile("many", deadline=None, database=None, max_examples=300)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "few"))

IMAGE_SIZE = 32  # twice the nano network's stride: the last stage still has 2 x 2 pixels


@pytest.fixture(scope="session")
def golden() -> Path:
    """Vectors made by running the authors' code (data only)."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def digits() -> ImageData:
    return open_data("digits", IMAGE_SIZE)


@pytest.fixture(scope="session")
def few_digits(digits: ImageData) -> ImageData:
    """The first 96 training and 48 validation images of `digits`."""

    def first(split: TensorSplit, count: int) -> TensorSplit:
        return TensorSplit(split.images[:count], split.labels[:count], split.identities[:count])

    assert isinstance(digits.train, TensorSplit)
    assert isinstance(digits.val, TensorSplit)
    return ImageData("digits", digits.preprocess, first(digits.train, 96), first(digits.val, 48), mirror=False)


@pytest.fixture(scope="session")
def inputs(few_digits: ImageData) -> Tensor:
    """Network inputs of 32 validation images, `(32, 3, 32, 32)`."""
    return normalise(torch.stack([few_digits.val[i][0] for i in range(32)]), few_digits.preprocess)


def _train(model: HadaptiveNet, data: ImageData) -> HadaptiveNet:
    """Give every norm parameters away from 1 and 0, then learn the images: a second on one core."""
    generator = torch.Generator().manual_seed(1)

    def draw(parameter: Tensor, low: float, high: float) -> None:
        parameter.data.copy_(torch.rand(parameter.shape, generator=generator) * (high - low) + low)

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | DySoft):
            draw(module.weight, 0.6, 1.4)
            draw(module.bias, -0.3, 0.3)
        if isinstance(module, DySoft):
            draw(module.alpha, 0.3, 0.6)
    for _, ach in model.ach_modules():
        ach.noise.zero_()
    model.train()
    inputs = normalise(torch.stack([data.train[i][0] for i in range(len(data.train))]), data.preprocess)
    labels = torch.tensor([data.train[i][1] for i in range(len(data.train))])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    for _ in range(60):
        rows = torch.randperm(len(labels), generator=generator)[:32]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[rows]), labels[rows]).backward()
        for _, ach in model.ach_modules():
            ach.scorer.step_temperature()
        optimizer.step()
    with torch.no_grad():
        for _ in range(20):  # statistics of these weights, not of the ones on the way: 0.9^20 = 12 % are left
            model(inputs)
    return model.eval()


@pytest.fixture(scope="session")
def make_nano(few_digits: ImageData, inputs: Tensor) -> Callable[..., HadaptiveNet]:
    """Return a function that gives a nano network that knows 96 digits; it may be changed.

    `selection` is "rank" or "channel" (per sample, slots in that order), or "static".
    """

    @functools.cache
    def trained(slot_order: str) -> HadaptiveNet:
        torch.manual_seed(0)
        return _train(create_model("hadaptive_net_nano", 10, slot_order=slot_order), few_digits)

    def make(selection: str = "rank") -> HadaptiveNet:
        model = copy.deepcopy(trained("rank" if selection == "static" else selection))
        if selection == "static":
            freeze_selection(model, [inputs])
        return model

    return make


@pytest.fixture(scope="session")
def make_graph(make_nano: Callable[..., HadaptiveNet]) -> Callable[..., GraphModule]:
    """Return a function that gives the graph of `make_nano(selection)`, as traced or deployed; it may be changed."""

    @functools.cache
    def made(form: Callable[[HadaptiveNet, int], GraphModule], selection: str) -> GraphModule:
        return form(make_nano(selection), IMAGE_SIZE)

    def make(form: Callable[[HadaptiveNet, int], GraphModule], selection: str = "rank") -> GraphModule:
        return copy.deepcopy(made(form, selection))

    return make


@pytest.fixture(scope="session")
def make_program(
    make_graph: Callable[..., GraphModule], few_digits: ImageData, inputs: Tensor
) -> Callable[..., QuantizedProgram]:
    """Return a function that gives `make_nano(selection)`, calibrated on `inputs`; not to be changed.

    Its pointwise weights have `bits`, 8 unless given.
    """

    @functools.cache
    def make(selection: str, bits: Bits = 8) -> QuantizedProgram:
        graph = make_graph(deploy_graph, selection)
        prepared = backend.prepare(graph, make_plan(graph, QuantizeConfig(pointwise_weight_bits=bits)), "minmax")
        return backend.convert(backend.calibrate(prepared, [inputs]), few_digits.preprocess)

    return make


@pytest.fixture(scope="session")
def make_file(make_program: Callable[[str], QuantizedProgram]) -> Callable[[str], Lowered]:
    """Return a function that gives the file of `make_program(selection)`."""
    return functools.cache(lambda selection: lower(make_program(selection).export()))


@pytest.fixture
def nano(make_nano: Callable[..., HadaptiveNet]) -> HadaptiveNet:
    """A nano network in eval mode; the test may change it."""
    return make_nano()


@pytest.fixture
def nano_traced(make_graph: Callable[..., GraphModule]) -> GraphModule:
    """The graph of `nano` before any rewrite; the test may change it."""
    return make_graph(trace)


@pytest.fixture
def nano_graph(make_graph: Callable[..., GraphModule]) -> GraphModule:
    """`nano` in deploy form; the test may change it."""
    return make_graph(deploy_graph)


@pytest.fixture(scope="session")
def make_byte_program(
    make_nano: Callable[..., HadaptiveNet], few_digits: ImageData
) -> Callable[[InputName], QuantizedProgram]:
    """Return a function that gives the nano network as a calibrated program of input `name`, to be read only."""

    @functools.cache
    def made(name: InputName) -> QuantizedProgram:
        model = take_pixels(make_nano("channel"), few_digits.preprocess)
        images = torch.stack([few_digits.val[i][0] for i in range(32)])
        graph = deploy_graph(model, IMAGE_SIZE)
        prepared = backend.prepare(graph, make_plan(graph, QuantizeConfig(input=name)), "minmax")
        preprocess = few_digits.preprocess.unnormalised
        return backend.convert(backend.calibrate(prepared, [normalise(images, preprocess)]), preprocess, name)

    return made


@pytest.fixture(scope="session")
def make_byte_file(make_byte_program: Callable[[InputName], QuantizedProgram]) -> Callable[[InputName], Lowered]:
    """Return a function that gives the file of `make_byte_program(name)`."""
    return functools.cache(lambda name: lower(make_byte_program(name).export()))


@dataclass(frozen=True)
class Run:
    """A finished run of the nano network: its folder, its report, and the program it converted."""

    folder: Path
    report: Report
    program: QuantizedProgram


@pytest.fixture(scope="session")
def nano_run(
    make_nano: Callable[..., HadaptiveNet], digits: ImageData, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """The nano network through `int8_ptq`, to be read only: lowering takes most of its time."""
    folder = tmp_path_factory.mktemp("run")
    model = make_nano()
    model.preprocess = digits.preprocess
    save_model(model, folder / "nano.safetensors")
    converted: list[QuantizedProgram] = []

    def kept(*arguments: Any) -> QuantizedProgram:
        converted.append(quantized_program(*arguments))
        return converted[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "quantized_program", kept)
        report = pipeline.quantize(load_recipe("int8_ptq"), folder / "run", folder / "nano.safetensors")
    return Run(folder / "run", report, converted[0])


@pytest.fixture(scope="session")
def assert_float_equal() -> Callable[[Tensor, Tensor], None]:
    """Compare a rewritten float network with its original.

    1e-5 of the largest value: a few dozen float32 roundings (6e-8 each) through some twenty layers stay a factor
    of ten below it; one wrong tap, channel or sign is orders of magnitude above.
    """

    def check(got: Tensor, wanted: Tensor) -> None:
        assert got.shape == wanted.shape
        largest = float(wanted.abs().max())
        assert largest > 0, "nothing to compare with"
        assert float((got - wanted).abs().max()) <= 1e-5 * largest

    return check
