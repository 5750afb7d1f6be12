"""A run rebuilt from its folder computes what it computed, and a folder that is no run is named for what it lacks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hadaptive_q.errors import UserError
from hadaptive_q.lower.parity import compare, output_scale
from hadaptive_q.lower.runtime import PteFile
from hadaptive_q.models.hadaptive_net import HadaptiveNet
from hadaptive_q.quant.backends.torchao_pt2e import activation_quantizers
from hadaptive_q.restore import FILES, open_run
from hadaptive_q.rewrite.freeze_selection import freeze_selection
from hadaptive_q.train.loop import predict


def test_restored_program_is_the_converted_one(nano_run: Any, inputs: Tensor) -> None:
    restored = open_run(nano_run.folder)
    program = restored.program()
    for batch in (1, 32):
        wanted = nano_run.program(inputs[:batch])
        assert torch.equal(program(inputs[:batch]), wanted)
        with torch.no_grad():  # the calibrated graph itself, which `program` left as it was
            assert torch.equal(restored.calibrated.graph(inputs[:batch]), wanted)
    assert len(wanted.unique()) > 100


def test_restored_program_equals_the_file_as_closely(nano_run: Any) -> None:
    restored = open_run(nano_run.folder)
    preprocess, parity = restored.data.preprocess, nano_run.report.parity
    program = restored.program()
    quantized, _ = predict(program.graph, restored.data.val, preprocess)
    file = PteFile(nano_run.folder / "model.pte").predict(restored.data.val, preprocess)
    found = compare(quantized, file, output_scale(program.graph))
    assert (found.sqnr_db, found.max_codes) == (parity.sqnr_db, parity.max_codes)
    assert (found.top1_agreement, found.changed_fraction) == (parity.top1_agreement, parity.changed_fraction)


def test_restored_graph_only_computes(nano_run: Any) -> None:
    for quantizer in activation_quantizers(open_run(nano_run.folder).calibrated.graph):
        assert quantizer.fake_quant_enabled[0]
        assert not quantizer.observer_enabled[0]
        assert not quantizer.follow


@pytest.fixture
def copied(nano_run: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(nano_run.folder, folder)
    return folder


@pytest.fixture
def static(copied: Path, make_nano: Callable[..., HadaptiveNet], inputs: Tensor) -> Path:
    """A run whose recipe and selection say static, beside the state of one that selects per image."""
    recipe = copied / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("selection: dynamic", "selection: static"))
    (copied / "selection.json").write_text(json.dumps(freeze_selection(make_nano(), [inputs])))
    return copied


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_named(name: str, copied: Path) -> None:
    (copied / name).unlink()
    with pytest.raises(UserError, match=f"no {name}.*finished.*qat --out"):
        open_run(copied)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        open_run(tmp_path / "nowhere")


def test_missing_selection(static: Path) -> None:
    (static / "selection.json").unlink()
    with pytest.raises(UserError, match=r"no selection\.json"):
        open_run(static)


# Too few, out of range on either side, no whole numbers, no numbers.
OTHER_CHANNELS = ("[0, 1]", "[0, 1, 2, 3, 4, 999]", "[-1, 1, 2, 3, 4, 5]", "[0.5, 1, 2, 3, 4, 5]", '"x"')


@pytest.mark.parametrize("chosen", OTHER_CHANNELS)
def test_a_selection_of_other_channels(chosen: str, static: Path) -> None:
    path = static / "selection.json"
    path.write_text(path.read_text().replace(path.read_text().split(": ")[1].split(', "')[0], chosen))
    with pytest.raises(UserError, match=r"selection\.json: got '.*run it again"):
        open_run(static)


@pytest.mark.parametrize("content", ["[1]", "{", "{}"])
def test_broken_selection(content: str, static: Path) -> None:
    (static / "selection.json").write_text(content)
    with pytest.raises(UserError, match=r"selection\.json.*run it again"):
        open_run(static)


@pytest.mark.parametrize("cut", [0, 7, 5000])
def test_truncated_state(cut: int, copied: Path) -> None:
    state = copied / "quantized.safetensors"
    state.write_bytes(state.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"quantized\.safetensors.*run it again"):
        open_run(copied)


def test_state_of_another_run(static: Path) -> None:
    with pytest.raises(UserError, match=r"quantized\.safetensors.*run it again"):
        open_run(static)


def test_report_of_another_version(copied: Path) -> None:
    report = json.loads((copied / "report.json").read_text())
    del report["accuracy"]["samples"]
    (copied / "report.json").write_text(json.dumps(report))
    with pytest.raises(UserError, match=r"report\.json, accuracy\.samples"):
        open_run(copied)


def test_data_that_changed(copied: Path) -> None:
    manifest = copied / "calibration.yaml"
    manifest.write_text(manifest.read_text().replace("digest: sha256:", "digest: sha256:f"))
    with pytest.raises(UserError, match="the data changed"):
        open_run(copied)
