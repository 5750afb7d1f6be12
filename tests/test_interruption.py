"""Killed anywhere and started again, a run ends with the bytes of one that nobody killed, in another process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hadaptive_q import atomic, pipeline
from hadaptive_q.__main__ import main
from hadaptive_q.models.checkpoint import read_training_key
from hadaptive_q.recipe import Recipe, load_recipe

# Live BatchNorm, an average of the weights and ranges that freeze half-way: everything that has a state.
SETTINGS = (
    *("model=hadaptive_net_nano", "image_size=32", "float.epochs=3", "float.batch_size=16", "float.ema=0.5"),
    *("fit.epochs=3", "fit.batch_size=16", "fit.ema=0.5", "fit.batch_norm=live", "fit.damping=0.1"),
)
FORMATS = ("pte", "onnx")
SAME_BYTES = ("float.safetensors", "quantized.safetensors", "model.pte", "float.pte", "model.onnx", "recipe.yaml")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of sixteen images of noise with a bright band."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for label in range(3):
        (root / f"band {label}").mkdir()
        for index in range(16):
            pixels = generator.integers(0, 160, (32, 32, 3), dtype=np.uint8)
            pixels[10 * label : 10 * label + 10] += 90
            Image.fromarray(pixels).save(root / f"band {label}" / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run as a process of its own, with an order of its own in sets of texts."""
    out = tmp_path_factory.mktemp("undisturbed")
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    command = [sys.executable, "-m", "hadaptive_q", "qat", "--data", str(images), "--out", str(out), *settings]
    environment = {**os.environ, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--to", ",".join(FORMATS)], env=environment, check=True, capture_output=True)
    return out


def recipe_of(images: Path) -> Recipe:
    return load_recipe("int8", [f"data={json.dumps(str(images))}", *SETTINGS])


def in_a_child(step: Callable[[], object]) -> int:
    """Run `step` in a copy of this process and return how that ended: 0, or minus the number of its signal."""
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException), contextlib.redirect_stderr(open(os.devnull, "w")):
            step()
            code = 0
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(name: str, count: int, renamed: bool, step: Callable[[], object]) -> None:
    """Run `step` in a child that is killed just before or after the file `name` is put in place for the `count`th time."""

    def doomed() -> None:
        replace, seen = os.replace, []

        def counting(source: Path, target: Path) -> None:
            seen.extend([target] * (target.name == name))
            if len(seen) == count and not renamed:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)
            if len(seen) == count:
                os.kill(os.getpid(), signal.SIGKILL)

        atomic.os.replace = counting  # type: ignore[attr-defined]
        step()

    assert in_a_child(doomed) == -signal.SIGKILL, f"{name} was not written {count} times"


# In the order of a run. Counts begin anew with every start: what is kept is not written again.
KILLS = [
    ("float.state", 1, False),
    ("float.state", 2, True),
    ("float.state", 1, True),
    ("float.safetensors", 1, False),
    ("float.safetensors", 1, True),
    ("qat.state", 2, False),
    ("qat.state", 1, True),
    ("quantized.safetensors", 1, False),
    ("quantized.safetensors", 1, True),
]


@pytest.fixture(scope="module")
def continued(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run, killed at all of `KILLS` on its way."""
    out = tmp_path_factory.mktemp("continued")
    recipe = recipe_of(images)
    for name, count, renamed in KILLS:
        killed_at(name, count, renamed, lambda: pipeline.quantize(recipe, out, to=FORMATS))
        left = [path for path in out.iterdir() if path.suffix == atomic.PART]
        assert len(left) == (not renamed), "one part of a file, and only where it had not become one"
        for state in out.glob("*.state"):
            assert torch.load(state, weights_only=True)["epoch"] >= 1
        if (out / "float.json").is_file():
            assert read_training_key(out / "float.safetensors") is not None
        assert not (out / "report.json").exists()
    steps: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hadaptive_q.train.loop.save_state", lambda path, *_: steps.append(path.name))
        pipeline.quantize(recipe, out, to=FORMATS)
    assert steps == [], "all training was done before it was killed for the last time"
    return out


@pytest.mark.parametrize("name", SAME_BYTES)
def test_the_files_are_the_same_bytes(name: str, continued: Path, undisturbed: Path) -> None:
    assert (continued / name).read_bytes() == (undisturbed / name).read_bytes()


def test_the_reports_differ_in_latency_only(continued: Path, undisturbed: Path) -> None:
    ours, theirs = (json.loads((folder / "report.json").read_text()) for folder in (continued, undisturbed))
    assert ours.pop("latency").keys() == theirs.pop("latency").keys()
    assert ours == theirs


def test_nothing_is_left_behind(continued: Path, undisturbed: Path) -> None:
    assert {path.name for path in continued.iterdir()} == {path.name for path in undisturbed.iterdir()}
    assert not [path.name for path in continued.iterdir() if path.name.startswith(".") or path.suffix == ".state"]


def test_a_run_in_a_finished_folder_takes_its_report_away_first(continued: Path, images: Path, tmp_path: Path) -> None:
    """Killed on its way, it must not leave the report of other files."""
    for name in ("float.safetensors", "float.json", "report.json"):
        (tmp_path / name).write_bytes((continued / name).read_bytes())
    recipe = recipe_of(images)
    killed_at("recipe.yaml", 1, False, lambda: pipeline.quantize(recipe, tmp_path))
    assert not (tmp_path / "report.json").exists()
    assert (tmp_path / "float.json").exists(), "the float network is the same and stays"


@pytest.mark.parametrize(
    ("kept", "said"), [([], "nothing yet"), (["float.safetensors", "qat.state"], "float.safetensors, qat.state")]
)
def test_control_c_says_what_is_kept(
    kept: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        for name in kept:
            (tmp_path / name).touch()
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(pipeline, "_quantize", interrupted)
    monkeypatch.setattr(sys, "argv", ["hadaptive-q", "qat", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    wanted = f"hadaptive-q: interrupted; {tmp_path} keeps {said}; the same command goes on from there\n"
    assert capfd.readouterr().err == wanted
    assert {path.name for path in tmp_path.iterdir()} == set(kept)
