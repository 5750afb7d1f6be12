"""A network with attention: layers in codes, norms and attention in float between them, one delegate."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from hadaptive_q import pipeline
from hadaptive_q.data.calibration import Manifest, resolve
from hadaptive_q.data.datasets import ImageData
from hadaptive_q.lower.executorch import lower
from hadaptive_q.lower.parity import sqnr_db
from hadaptive_q.lower.runtime import PteFile
from hadaptive_q.models.families import create_model
from hadaptive_q.models.network import Network
from hadaptive_q.quant.interpreter import IntegerProgram
from hadaptive_q.quant.plan import make_plan
from hadaptive_q.recipe import QuantizeConfig, load_recipe
from hadaptive_q.rewrite.deploy import deploy_graph
from hadaptive_q.rewrite.graph import aten, calls


@pytest.fixture(scope="module")
def model(inputs: Tensor) -> Network:
    """The smallest network, its attention far from even, its BatchNorms of these images."""
    torch.manual_seed(0)
    model = create_model("s2aformer_nano", 10)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
                module.weight.mul_(15)
        for _ in range(20):
            model.train()(inputs)
    return model.eval()


@pytest.fixture(scope="module")
def graph(model: Network, inputs: Tensor) -> GraphModule:
    return deploy_graph(model, inputs.shape[-1])


def test_the_plan_leaves_norms_and_attention_in_float(graph: GraphModule) -> None:
    planned = make_plan(graph, QuantizeConfig()).activations.keys()
    floats = [*calls(graph, aten.bmm.default, aten.softmax.int, aten.rsqrt.default, aten.sub.Tensor)]
    assert len(floats) == 4 + 2 + 6 + 6
    assert not planned & {node.name for node in floats}
    # Their results become codes where layers read them.
    layers = [node for node in calls(graph, aten.conv2d.default) if node.name in planned]
    assert len(layers) == 4 + 2 * 9 + 2
    assert all(node.args[0].name in planned for node in layers)  # type: ignore[union-attr]


# The shorter job is in the longer one, and a file takes ten seconds to lower.
@pytest.mark.parametrize("recipe", ["int8", pytest.param("int8_ptq", marks=pytest.mark.slow)])
def test_a_recipe_gives_one_delegate_that_answers_like_its_program(
    recipe: str, model: Network, few_digits: ImageData, inputs: Tensor, tmp_path: Path
) -> None:
    chosen = load_recipe(recipe, ["model=s2aformer_nano", *(["fit.epochs=1"] if recipe == "int8" else [])])
    manifest = resolve(Manifest(source="digits", split="train", count=64, seed=0), few_digits)
    with torch.no_grad():
        wanted = model(inputs)
    program = pipeline.quantized_program(chosen, copy.deepcopy(model), few_digits, manifest, tmp_path, model)

    lowered = lower(program.export())
    assert (lowered.coverage.delegates, lowered.coverage.portable_ops) == (1, ())
    kinds = {"batch_matrix_multiply", "softmax", "conv2d", "multiply", "subtract", "reciprocal_square_root"}
    assert set(lowered.coverage.fp32_ops) == kinds
    # Of the rows around the attention none are transposed but keys: one in each block, the image and the mean.
    assert lowered.coverage.transposes == 2 + 2

    (tmp_path / "model.pte").write_bytes(lowered.data)
    file, integers = PteFile(tmp_path / "model.pte"), IntegerProgram(program)
    found = torch.cat([file(image[None]) for image in inputs])
    assert sqnr_db(wanted, found) > 20
    # Sums in float have another order in the file: here and there a value rounds to the neighbouring code.
    codes = (found - integers(inputs)).div(integers.output_grid.scale).round().abs()
    assert codes.max() <= 2
    assert (codes > 0).float().mean() < 0.05
