"""Lowered files load, run and answer like the program they came from, whatever the layout of the image."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hadaptive_q.errors import UserError
from hadaptive_q.lower.executorch import lower
from hadaptive_q.lower.file_input import FileInput
from hadaptive_q.lower.parity import agreement
from hadaptive_q.lower.runtime import PteFile
from hadaptive_q.models.families import create_model
from hadaptive_q.quant.program import export_graph
from hadaptive_q.rewrite.deploy import deploy_graph
from hadaptive_q.rewrite.drop_no_ops import drop_no_ops


@pytest.fixture(scope="module")
def float_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    torch.manual_seed(0)
    model = create_model("hadaptive_net_nano", 10).eval()
    graph = deploy_graph(model, 32)
    drop_no_ops(graph)
    lowered = lower(export_graph(graph, 32))
    assert lowered.coverage.delegates == 1
    assert lowered.coverage.portable_ops == ()
    assert "depthwise_conv2d" in lowered.coverage.fp32_ops
    assert lowered.coverage.int8_ops == ()
    path = tmp_path_factory.mktemp("pte") / "float.pte"
    path.write_bytes(lowered.data)
    return model, path


def test_float_file_answers_like_the_model(float_file: tuple[torch.nn.Module, Path]) -> None:
    model, path = float_file
    file = PteFile(path)
    assert file.input == FileInput("float32", (1, 3, 32, 32))
    inputs = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        wanted = model(inputs)
    found = torch.cat([file(image[None]) for image in inputs])
    # Float kernels sum in another order: equal to a few units of the last place of the largest logit.
    assert (wanted - found).abs().max() <= 1e-4 * wanted.abs().max()
    assert agreement(wanted, found) == 1


def test_channels_last_images_get_the_same_answer(float_file: tuple[torch.nn.Module, Path]) -> None:
    file = PteFile(float_file[1])
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(file(image), file(image.to(memory_format=torch.channels_last)))


def test_channels_last_example_does_not_reach_the_file(
    float_file: tuple[torch.nn.Module, Path], tmp_path: Path
) -> None:
    """A model that was used in channels-last still lowers to a file that takes contiguous images."""
    model, path = float_file
    graph = deploy_graph(model.to(memory_format=torch.channels_last), 32)
    drop_no_ops(graph)
    (tmp_path / "again.pte").write_bytes(lower(export_graph(graph, 32)).data)
    image = torch.randn(1, 3, 32, 32)
    wanted = PteFile(path)(image)
    assert (PteFile(tmp_path / "again.pte")(image) - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_wrong_input_is_named(float_file: tuple[torch.nn.Module, Path]) -> None:
    with pytest.raises(UserError, match=r"input float32 \(1, 3, 32, 32\)"):
        PteFile(float_file[1])(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("cut", [0, 100, 5000])
def test_cut_files_are_refused(float_file: tuple[torch.nn.Module, Path], tmp_path: Path, cut: int) -> None:
    (tmp_path / "cut.pte").write_bytes(float_file[1].read_bytes()[:cut])
    with pytest.raises(UserError, match=r"cut\.pte"):
        PteFile(tmp_path / "cut.pte")
