"""Shared fixtures: golden vectors, small data, a nano network that behaves like a trained one, its deploy graph."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

# Before anything imports a library that reads them: caches of a test run are its own, and nothing asks the network.
_CACHE = tempfile.TemporaryDirectory(prefix="hadaptive-q-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name
os.environ["HF_HOME"] = f"{_CACHE.name}/huggingface"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from hadaptive_q.data.datasets import ImageData, TensorSplit, open_data
from hadaptive_q.data.transforms import normalise
from hadaptive_q.models.ach import DySoft
from hadaptive_q.models.hadaptive_net import HadaptiveNet, create_model
from hadaptive_q.rewrite.deploy import deploy_graph
from hadaptive_q.rewrite.graph import trace

# Tensors here are tiny: threads that wait for each other on a busy machine took 170 times as long as the work.
torch.set_num_threads(1)

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


def _as_if_trained(model: HadaptiveNet, images: Tensor) -> HadaptiveNet:
    """Give every norm parameters away from 1 and 0, and every BatchNorm the statistics it meets on `images`."""
    generator = torch.Generator().manual_seed(1)

    def draw(parameter: Tensor, low: float, high: float) -> None:
        parameter.data.copy_(torch.rand(parameter.shape, generator=generator) * (high - low) + low)

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | DySoft):
            draw(module.weight, 0.6, 1.4)
            draw(module.bias, -0.3, 0.3)
        if isinstance(module, DySoft):
            draw(module.alpha, 0.3, 0.6)
    model.train()
    with torch.no_grad():
        for _ in range(30):  # running statistics keep 0.9^30 = 4 % of their start
            model(images)
    return model.eval()


@pytest.fixture(scope="session")
def make_nano(inputs: Tensor) -> Callable[..., HadaptiveNet]:
    """Return a function that builds a nano network of 10 classes, as if trained, always the same one."""

    def make(**overrides: object) -> HadaptiveNet:
        torch.manual_seed(0)
        return _as_if_trained(create_model("hadaptive_net_nano", 10, **overrides), inputs)

    return make


@pytest.fixture(scope="session")
def _nano(make_nano: Callable[..., HadaptiveNet]) -> HadaptiveNet:
    return make_nano()


@pytest.fixture(scope="session")
def _traced(_nano: HadaptiveNet) -> GraphModule:
    return trace(_nano, IMAGE_SIZE)


@pytest.fixture(scope="session")
def _deployed(_nano: HadaptiveNet) -> GraphModule:
    return deploy_graph(_nano, IMAGE_SIZE)


@pytest.fixture
def nano(_nano: HadaptiveNet) -> HadaptiveNet:
    """A nano network in eval mode; the test may change it."""
    return copy.deepcopy(_nano)


@pytest.fixture
def nano_traced(_traced: GraphModule) -> GraphModule:
    """The graph of `nano` before any rewrite; the test may change it."""
    return copy.deepcopy(_traced)


@pytest.fixture
def nano_graph(_deployed: GraphModule) -> GraphModule:
    """`nano` in deploy form; the test may change it."""
    return copy.deepcopy(_deployed)


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
