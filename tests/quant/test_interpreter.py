"""The interpreter and the written file: the same codes for every image, per-sample and frozen selection alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from hadaptive_q.data.datasets import ImageData
from hadaptive_q.data.transforms import normalise
from hadaptive_q.lower.executorch import Lowered, lower
from hadaptive_q.lower.runtime import PteFile
from hadaptive_q.models.config import Preprocess
from hadaptive_q.models.families import create_model
from hadaptive_q.quant import arithmetic
from hadaptive_q.quant.backends import torchao_pt2e as backend
from hadaptive_q.quant.interpreter import Coverage, IntegerProgram
from hadaptive_q.quant.plan import Plan, make_plan
from hadaptive_q.quant.program import QuantizedProgram
from hadaptive_q.recipe import QuantizeConfig
from hadaptive_q.rewrite.deploy import deploy_graph
from hadaptive_q.rewrite.freeze_selection import freeze_selection
from hadaptive_q.rewrite.products import find_products

Q = torch.ops.quantized_decomposed


def converted(graph: GraphModule, data: ImageData, inputs: Tensor) -> QuantizedProgram:
    prepared = backend.prepare(graph, make_plan(graph, QuantizeConfig()), "minmax")
    return backend.convert(backend.calibrate(prepared, inputs.split(16)), data.preprocess)


def written(program: QuantizedProgram, path: Path) -> PteFile:
    path.write_bytes(lower(program.export()).data)
    return PteFile(path)


@pytest.fixture(scope="module")
def images(digits: ImageData) -> Tensor:
    """Network inputs of 80 validation images, most not calibrated with, 240 of noise, and constant ones."""
    shown = normalise(torch.stack([digits.val[4 * i][0] for i in range(80)]), digits.preprocess)
    noise = torch.randn(240, *shown.shape[1:], generator=torch.Generator().manual_seed(0)) * 2
    extremes = torch.stack([torch.full(shown.shape[1:], value) for value in (0.0, 1e4, -1e4)])
    return torch.cat((shown, noise, extremes))


@pytest.fixture(scope="module", params=["rank", "static"])
def selection(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def program(selection: str, make_program: Callable[[str], QuantizedProgram]) -> QuantizedProgram:
    return make_program(selection)


@pytest.mark.parametrize(
    "selection",
    # A file takes ten seconds to lower: one form in every run, which has all that the others have.
    ["rank", pytest.param("static", marks=pytest.mark.slow), pytest.param("channel", marks=pytest.mark.slow)],
    indirect=True,
)
def test_codes_are_those_of_the_file(
    selection: str,
    program: QuantizedProgram,
    make_file: Callable[[str], Lowered],
    images: Tensor,
    tmp_path: Path,
) -> None:
    (tmp_path / "model.pte").write_bytes(make_file(selection).data)
    file, integers = PteFile(tmp_path / "model.pte"), IntegerProgram(program)
    wanted = torch.cat([file(image[None]) for image in images])
    found = integers(images)
    assert torch.equal(found, wanted)
    assert torch.equal(arithmetic.dequantize(integers.output_codes(images), integers.output_grid), wanted)
    assert len(integers.output_codes(images).unique()) > 100
    # What the test is worth: the float program does not pass it.
    assert not torch.equal(program(images), wanted)


def test_layers_run_on_integers_and_the_selection_in_float(program: QuantizedProgram) -> None:
    coverage = IntegerProgram(program).coverage
    layers = len(program.plan.weights)
    assert sum("conv2d" in str(n.target) or "linear" in str(n.target) for n in program.graph.graph.nodes) >= layers
    targets = {n.name: n.target for n in IntegerProgram(program).graph.graph.nodes}
    on_integers = [targets[name] for name in coverage.integer]
    assert on_integers.count(arithmetic.conv2d) + on_integers.count(arithmetic.linear) == layers
    assert on_integers.count(arithmetic.add) >= 3
    assert on_integers.count(arithmetic.lookup) >= 10
    # The mean of the head; those that score channels need more than 8 bits.
    assert on_integers.count(arithmetic.mean_hw) == 1
    floating = {str(getattr(targets[name], "__name__", targets[name])) for name in coverage.floating}
    per_sample = any(product.choice for product in find_products(program.graph))
    assert ("mean_hw" in floating) == per_sample
    assert not {"hardswish", "conv2d.default", "dequantize_per_channel.default"} & floating


def test_codes_of_any_tensor(program: QuantizedProgram, inputs: Tensor) -> None:
    integers = IntegerProgram(program)
    names = integers.names
    assert len(names) == len(set(names)) > 40
    found = integers.codes(inputs[:8], names)
    assert set(found) == set(names)
    assert all(codes.dtype == torch.int8 for codes in found.values())
    # By hand: the image, quantized with the scale in the graph, and its 4 x 4 pixels as 48 channels of the same codes.
    (quantizer,) = (n for n in program.graph.graph.nodes if n.args and str(n.args[0]) == names[0])
    image = arithmetic.quantize(inputs[:8], arithmetic.Grid(*quantizer.args[1:3]))
    assert torch.equal(found[names[0]], image)
    cells = image.reshape(8, 3, 8, 4, 8, 4).permute(0, 1, 3, 5, 2, 4).reshape(8, 48, 8, 8)
    patches = [name for name in names if torch.equal(found[name], cells)]
    assert patches
    assert integers.grid(patches[0]) == integers.grid(names[0])
    with pytest.raises(KeyError):
        integers.codes(inputs[:1], ["no such tensor"])


def test_results_do_not_depend_on_the_batch(program: QuantizedProgram, images: Tensor) -> None:
    integers = IntegerProgram(program)
    assert torch.equal(torch.cat([integers(part) for part in images[:24].split(5)]), integers(images[:24]))


def test_the_program_is_left_alone(program: QuantizedProgram, inputs: Tensor) -> None:
    before = program(inputs[:4])
    IntegerProgram(program)
    assert torch.equal(program(inputs[:4]), before)


def through(x: Tensor, scale: float, zero_point: int) -> Tensor:
    codes = Q.quantize_per_tensor(x, scale, zero_point, -128, 127, torch.int8)
    out: Tensor = Q.dequantize_per_tensor(codes, scale, zero_point, -128, 127, torch.int8)
    return out


def one_operator(operator: Callable[[Tensor], Tensor]) -> QuantizedProgram:
    """quantize -> `operator` -> quantize, both with the scale 0.02, for inputs `(1, 4, 8, 8)`."""

    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return through(operator(through(x, 0.02, 3)), 0.02, 3)

    graph = torch.export.export(Module(), (torch.zeros(1, 4, 8, 8),)).module()
    assert isinstance(graph, GraphModule)
    return QuantizedProgram(graph, Plan(), Preprocess(image_size=8, mean=(0, 0, 0), std=(1, 1, 1), classes=("a",)))


@pytest.mark.parametrize(
    ("operator", "floating"),
    [
        (lambda x: x.permute(0, 2, 3, 1)[:, 1:5].flatten(1), ()),
        (lambda x: torch.cat((x, x), dim=1), ()),
        (lambda x: torch.cat((x, through(x, 0.05, -7)), dim=1), ()),  # two grids: through float, which is a copy
        (lambda x: x, ()),
        (lambda x: torch.tanh(x), ("tanh",)),
        (lambda x: x + 1.0, ("add",)),
        (lambda x: x.mean(1), ("mean",)),
    ],
)
def test_what_is_not_known_as_integer_runs_in_float(
    operator: Callable[[Tensor], Tensor], floating: tuple[str, ...]
) -> None:
    program = one_operator(operator)
    integers = IntegerProgram(program)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(integers(x), program(x))
    assert integers.coverage == Coverage((), floating)


def test_codes_of_a_file_whose_first_layer_reads_the_image_itself(
    few_digits: ImageData, inputs: Tensor, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    graph = deploy_graph(nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.Hardswish(), nn.Conv2d(8, 4, 15)), 32)
    program = converted(graph, few_digits, inputs)
    file, integers = written(program, tmp_path / "model.pte"), IntegerProgram(program)
    assert torch.equal(integers(inputs), torch.cat([file(image[None]) for image in inputs]))
    assert len(integers.output_codes(inputs).unique()) > 20


@pytest.mark.slow
@pytest.mark.parametrize("selection", ["per_sample", "static"])
def test_codes_of_a_whole_s(selection: str, tmp_path: Path) -> None:
    """Hadaptive-Net-S, random weights, 64 x 64: 128 images of noise."""
    torch.manual_seed(0)
    model = create_model("hadaptive_net_s", 10)
    calibration, images = torch.randn(32, 3, 64, 64), torch.randn(128, 3, 64, 64)
    with torch.no_grad():
        for _ in range(10):
            model.train()(calibration)
    if selection == "static":
        freeze_selection(model.eval(), [calibration])
    graph = deploy_graph(model.eval(), 64)
    prepared = backend.prepare(graph, make_plan(graph, QuantizeConfig()), "minmax")
    preprocess = Preprocess(image_size=64, mean=(0, 0, 0), std=(1, 1, 1), classes=tuple("0123456789"))
    program = backend.convert(backend.calibrate(prepared, [calibration]), preprocess)
    file = written(program, tmp_path / "model.pte")
    wanted = torch.cat([file(image[None]) for image in images])
    assert torch.equal(IntegerProgram(program)(images), wanted)
