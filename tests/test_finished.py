"""Which folders count as the run that is wanted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hadaptive_q.errors import UserError
from hadaptive_q.finished import PTE_FILES, find_finished, read_finished
from hadaptive_q.models.checkpoint import load_model, save_model
from hadaptive_q.models.hadaptive_net import HadaptiveNet
from hadaptive_q.recipe import Recipe, load_recipe
from hadaptive_q.restore import FILES


@pytest.fixture
def copied(nano_run: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(nano_run.folder, tmp_path / "run"))


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("int8_ptq")


@pytest.fixture
def checkpoint(nano_run: Any) -> Path:
    return Path(nano_run.folder.parent / "nano.safetensors")


def test_the_very_run_is_found(nano_run: Any, recipe: Recipe, checkpoint: Path) -> None:
    assert read_finished(nano_run.folder) == nano_run.report
    assert find_finished(recipe, nano_run.folder, checkpoint) == nano_run.report


def test_another_recipe_is_another_run(nano_run: Any, checkpoint: Path) -> None:
    assert find_finished(load_recipe("int8_ptq", ["seed=1"]), nano_run.folder, checkpoint) is None


def test_other_weights_are_another_run(
    nano_run: Any, recipe: Recipe, make_nano: Callable[..., HadaptiveNet], tmp_path: Path
) -> None:
    save_model(make_nano("channel"), tmp_path / "other.safetensors")
    for other in (tmp_path / "other.safetensors", tmp_path / "nowhere.safetensors"):
        assert find_finished(recipe, nano_run.folder, other) is None


def test_a_run_from_a_checkpoint_is_none_that_trained(copied: Path, recipe: Recipe, checkpoint: Path) -> None:
    assert find_finished(recipe, copied, None) is None
    model = load_model(copied / "float.safetensors")
    save_model(model, copied / "float.safetensors", training_key="of this very training")
    assert find_finished(recipe, copied, None)
    assert find_finished(recipe, copied, checkpoint), "the same weights"


@pytest.mark.parametrize("name", [*FILES, *PTE_FILES])
def test_without_one_of_its_files_it_is_not_finished(copied: Path, name: str, recipe: Recipe, checkpoint: Path) -> None:
    (copied / name).unlink()
    assert find_finished(recipe, copied, checkpoint) is None
    with pytest.raises(UserError, match=f"no {name}"):
        read_finished(copied)


@pytest.mark.parametrize("name", PTE_FILES)
def test_another_file_is_not_what_was_measured(copied: Path, name: str, recipe: Recipe, checkpoint: Path) -> None:
    content = bytearray((copied / name).read_bytes())
    content[-1] ^= 1
    (copied / name).write_bytes(content)
    assert find_finished(recipe, copied, checkpoint) is None
    with pytest.raises(UserError, match=rf"{name}: got 'its bytes are not those that were measured'"):
        read_finished(copied)


def test_a_broken_report_is_none(copied: Path, recipe: Recipe, checkpoint: Path) -> None:
    report = json.loads((copied / "report.json").read_text())
    (copied / "report.json").write_text(json.dumps(report | {"accuracy": None}))
    assert find_finished(recipe, copied, checkpoint) is None
