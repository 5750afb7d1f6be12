"""What a shell completes, without loading torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer

from hadaptive_q import options
from hadaptive_q.arm.cores import CORES
from hadaptive_q.models.config import INPUTS, MODELS
from hadaptive_q.recipe import load_recipe, shipped


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for name in ("int9.yaml", "intern.txt", "model.safetensors", "images/own.yml"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize("command", ["train", "qat", "ptq", "search", "compare"])
def test_recipes_are_those_the_command_runs(folder: Path, command: str) -> None:
    context = click.Context(click.Command(command), info_name=command)
    tasks = {name: load_recipe(name).task for name in shipped("recipes")}
    taken = {"search": ["train", "qat", "ptq"], "compare": ["qat", "ptq"]}.get(command, [command])
    wanted = [name for name, task in tasks.items() if task in taken]
    assert wanted
    found = options.complete_recipe(context, "")  # type: ignore[arg-type]
    assert found == [*wanted, "images/", "int9.yaml"]
    assert options.complete_recipe(context, "images/") == ["images/own.yml"]  # type: ignore[arg-type]
    assert options.complete_recipe(context, "int9") == ["int9.yaml"]  # type: ignore[arg-type]


def test_data_are_names_and_folders(folder: Path) -> None:
    assert options.complete_data("") == ["digits", "glyphs", "hf:", "hf-stream:", "images/"]
    assert options.complete_data("im") == ["images/"]
    assert options.complete_data("gl") == ["glyphs"]
    assert options.complete_data("no/such/folder/") == []


def test_models_and_checkpoints(folder: Path) -> None:
    assert options.complete_model("") == list(MODELS)
    assert options.complete_model_or_file("") == [*MODELS, "images/", "model.safetensors"]
    assert options.complete_checkpoint("mod") == ["model.safetensors"]


def test_names_of_the_package() -> None:
    assert options.complete_core("cortex-a7") == [name for name in CORES if name.startswith("cortex-a7")]
    assert options.complete_input("") == list(INPUTS)
    assert options.complete_formats("") == ["pte", "onnx"]
    assert options.complete_formats("pte,") == ["pte,onnx"], "not the same twice"


def test_keys_of_a_recipe_are_settings_it_takes() -> None:
    assert options.complete_setting("fit.ep") == ["fit.epochs="]
    assert {"seed=", "quantize.observer=", "float.margin.gap="} <= set(options.complete_setting(""))
    for key in options.complete_setting("fit.d"):
        assert load_recipe("int8", [f"{key}0"])


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("hadaptive-q qat --recipe int8_s", ["int8_static"]),
        ("hadaptive-q expl", ["explain"]),
    ],
)
def test_a_shell_gets_them_without_torch(words: str, wanted: list[str]) -> None:
    code = (
        "import sys\n"
        "sys.argv = ['hadaptive-q']\n"
        "from hadaptive_q.__main__ import main\n"
        "try:\n    main()\n"
        "finally:\n    assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    asked = {"_HADAPTIVE_Q_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True, check=False
    )
    assert "torch was imported" not in done.stderr
    assert done.stdout.split() == wanted


def test_installing_completion_is_offered() -> None:
    from hadaptive_q.cli import app

    names = {name for parameter in typer.main.get_command(app).params for name in parameter.opts}
    assert {"--install-completion", "--show-completion", "--quiet"} <= names
