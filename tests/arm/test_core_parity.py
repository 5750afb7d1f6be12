"""The network that ships answers on emulated ARM64 cores as on this machine.

Where the selection is frozen everything in the file is integer arithmetic, and the outputs are the same bit for bit.
Where it follows the image, scores are float32 and sums may be taken in another order: what that moves is counted.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from executorch.runtime import Runtime
from torch import Tensor
from torch.fx.graph import CodeGen

from hadaptive_q.arm.cores import CORES
from hadaptive_q.arm.count import run_on
from hadaptive_q.lower.executorch import Lowered, lower
from hadaptive_q.lower.parity import output_scale
from hadaptive_q.lower.runtime import PteFile
from hadaptive_q.models.config import Preprocess
from hadaptive_q.models.families import create_model
from hadaptive_q.models.hadaptive_net import HadaptiveNet
from hadaptive_q.models.network import Network
from hadaptive_q.quant.backends import torchao_pt2e as backend
from hadaptive_q.quant.plan import make_plan
from hadaptive_q.quant.program import QuantizedProgram, export_graph
from hadaptive_q.recipe import QuantizeConfig
from hadaptive_q.rewrite.deploy import deploy_graph
from hadaptive_q.rewrite.freeze_selection import freeze_selection
from hadaptive_q.rewrite.products import chosen_indices, find_products


@dataclass(frozen=True)
class Shipped:
    """A written file, inputs `(N, 3, S, S)` and what this machine's runtime answers for them `(N, outputs)`."""

    path: Path
    inputs: Tensor
    outputs: Tensor


def quantized(model: Network, inputs: Tensor) -> QuantizedProgram:
    graph = deploy_graph(model, inputs.shape[-1])
    prepared = backend.prepare(graph, make_plan(graph, QuantizeConfig()), "minmax")
    classes = tuple(str(label) for label in range(10))
    preprocess = Preprocess(image_size=inputs.shape[-1], mean=(0.5,) * 3, std=(0.5,) * 3, classes=classes)
    return backend.convert(backend.calibrate(prepared, [inputs]), preprocess)


def static_file(lowered: Lowered, inputs: Tensor, path: Path) -> Shipped:
    path.write_bytes(lowered.data)
    file = PteFile(path)
    return Shipped(path, inputs, torch.cat([file(image[None]) for image in inputs]))


def small_s(count: int) -> tuple[HadaptiveNet, Tensor]:
    """Return S with random weights, and that many inputs."""
    torch.manual_seed(0)
    model, inputs = create_model("hadaptive_net_s", 10, slot_order="channel"), torch.randn(count, 3, 64, 64)
    with torch.no_grad():
        model.train()(inputs)  # running statistics that belong to the weights
    return model.eval(), inputs


@pytest.fixture(scope="module")
def static_nano(
    make_file: Callable[[str], Lowered], inputs: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Shipped:
    return static_file(make_file("static"), inputs, tmp_path_factory.mktemp("static") / "nano.pte")


@pytest.fixture(scope="module")
def static_s(tmp_path_factory: pytest.TempPathFactory) -> Shipped:
    model, inputs = small_s(4)
    freeze_selection(model, [inputs])
    lowered = lower(quantized(model, inputs).export())
    return static_file(lowered, inputs, tmp_path_factory.mktemp("static") / "s.pte")


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("name", ["static_nano", pytest.param("static_s", marks=pytest.mark.slow)])
def test_static_selection_is_the_same_bit_for_bit(core: str, name: str, request: pytest.FixtureRequest) -> None:
    file: Shipped = request.getfixturevalue(name)
    assert len(file.outputs.unique()) > len(file.outputs), "the answers do not depend on the image"
    found = run_on(file.path, core, file.inputs)
    differing = int((found != file.outputs.numpy()).sum())
    assert differing == 0, f"{name} on {core}: {differing} of {found.size} logits are not this machine's"


@pytest.fixture(scope="module")
def product_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Shipped]:
    """Return a function that gives the file of a family's nano network, which multiplies activations in int8."""

    @functools.cache
    def make(family: str) -> Shipped:
        torch.manual_seed(0)
        model, inputs = create_model(f"{family}_nano", 10), torch.randn(8, 3, 32, 32)
        with torch.no_grad():
            model.train()(inputs)  # running statistics that belong to the weights
        lowered = lower(quantized(model.eval(), inputs).export())
        assert lowered.coverage.fp32_ops == (), "integers alone are the same everywhere"
        assert "multiply" in lowered.coverage.int8_ops
        return static_file(lowered, inputs, tmp_path_factory.mktemp(family) / "nano.pte")

    return make


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("family", ["mobilenet_v3", "rcvit", "starnet"])
def test_products_are_the_same_bit_for_bit(family: str, core: str, product_file: Callable[[str], Shipped]) -> None:
    file = product_file(family)
    assert len(file.outputs.unique()) > len(file.outputs), "the answers do not depend on the image"
    found = run_on(file.path, core, file.inputs)
    differing = int((found != file.outputs.numpy()).sum())
    assert differing == 0, f"{family} on {core}: {differing} of {found.size} logits are not this machine's"


@dataclass(frozen=True)
class Choosing:
    """A file that also answers what every ACH chose: one-hot matrices `(C, Cs)` behind the `classes` logits."""

    file: Shipped
    scale: float
    classes: int
    shapes: list[tuple[int, int]]

    def split(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits `(N, classes)` and all chosen channels side by side `(N, sum of Cs)`."""
        logits, *choices = outputs.split([self.classes, *(c * cs for c, cs in self.shapes)], dim=1)
        matrices = (choice.unflatten(1, shape) for choice, shape in zip(choices, self.shapes, strict=True))
        return logits, torch.cat([chosen_indices(matrix) for matrix in matrices], dim=1)


def choosing(program: QuantizedProgram, inputs: Tensor, path: Path) -> Choosing:
    graph = copy.deepcopy(program.graph)
    nodes = {node.name: node for node in graph.graph.nodes}
    choices = [nodes[str(product.choice)] for product in find_products(graph)]
    output = graph.graph.output_node()
    output.args = ((output.args[0], *choices),)
    graph.graph.set_codegen(CodeGen())  # the exported one insists on one output
    graph.recompile()
    lowered = lower(export_graph(graph, inputs.shape[-1]))
    assert lowered.coverage.delegates == 1
    path.write_bytes(lowered.data)
    method = Runtime.get().load_program(path).load_method("forward")
    assert method is not None
    answers = [[out.clone() for out in method.execute([image[None].contiguous()])] for image in inputs]
    outputs = torch.stack([torch.cat([out.flatten() for out in answer]) for answer in answers])
    shapes = [(int(out.shape[1]), int(out.shape[2])) for out in answers[0][1:]]
    return Choosing(Shipped(path, inputs, outputs), output_scale(program.graph), answers[0][0].shape[1], shapes)


@pytest.fixture(scope="module")
def dynamic_nano(nano_run: Any, inputs: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Choosing:
    """Slots in rank order."""
    file = choosing(nano_run.program, inputs, tmp_path_factory.mktemp("dynamic") / "nano.pte")
    shipped = PteFile(nano_run.folder / "model.pte")
    logits = torch.cat([shipped(image[None]) for image in inputs])
    assert torch.equal(file.split(file.file.outputs)[0], logits), "answering the choices changed the logits"
    return file


@pytest.fixture(scope="module")
def dynamic_s(tmp_path_factory: pytest.TempPathFactory) -> Choosing:
    """Slots in channel order."""
    model, inputs = small_s(20)
    return choosing(quantized(model, inputs), inputs, tmp_path_factory.mktemp("dynamic") / "s.pte")


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("name", ["dynamic_nano", pytest.param("dynamic_s", marks=pytest.mark.slow)])
def test_dynamic_selection_chooses_what_this_machine_chooses(
    core: str, name: str, request: pytest.FixtureRequest
) -> None:
    """No image was seen to answer otherwise: scores that differ by a rounding lie nearer than any two that compete."""
    choices: Choosing = request.getfixturevalue(name)
    file = choices.file
    assert len(file.inputs) >= 20
    wanted, chosen = choices.split(file.outputs)
    assert len(chosen.unique(dim=0)) > 1, "every image chooses the same channels"
    found, found_chosen = choices.split(torch.from_numpy(run_on(file.path, core, file.inputs)))
    codes = int(((found - wanted).abs() > choices.scale / 2).sum())
    flipped = int((found_chosen != chosen).any(dim=1).sum())
    classes = int((found.argmax(dim=1) != wanted.argmax(dim=1)).sum())
    counted = f"{codes} of {wanted.numel()} codes, {flipped} images' channels and {classes} images' top-1"
    assert (codes, flipped, classes) == (0, 0, 0), f"{name} on {core}, {len(wanted)} images: other {counted}"
