"""Killed anywhere and started again, a run ends with the bytes of one that nobody killed."""

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
from hadaptive_q.data.calibration import find_manifest, resolve
from hadaptive_q.models.checkpoint import read_training_key
from hadaptive_q.recipe import Recipe, load_recipe

# Live BatchNorm, an average of the weights and ranges that freeze half-way: everything that has a state.
SETTINGS = (
    *("model=hadaptive_net_nano", "image_size=32", "float.epochs=3", "float.batch_size=16", "float.ema=0.5"),
    *("fit.epochs=3", "fit.batch_size=16", "fit.ema=0.5", "fit.batch_norm=live", "fit.damping=0.1"),
)
# The file before or after whose `count`th renaming a run is killed. Counts begin anew with every start: what is kept is
# not made again.
KILLS = [
    ("float.state", 2, False),
    ("float.safetensors", 1, True),
    ("qat.state", 2, False),
    ("qat.state", 1, True),
    ("quantized.safetensors", 1, False),
]


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
def recipe(images: Path) -> Recipe:
    return load_recipe("int8", [f"data={json.dumps(str(images))}", *SETTINGS])


def fit(recipe: Recipe, out: Path) -> None:
    """Do what a run does before it lowers."""
    data, trained = pipeline.train_float(recipe, out)
    manifest = resolve(find_manifest("auto", data), data)
    with atomic.output_folder(out):
        pipeline.quantized_program(recipe, trained.model, data, manifest, out, trained.model)


def killed(name: str, count: int, renamed: bool, step: Callable[[], object]) -> None:
    """Run `step` in a child that is killed at the `count`th renaming of `name`: just after it, or just before."""
    child = os.fork()
    if child == 0:
        replace = os.replace
        seen: list[Path] = []

        def counting(source: Path, target: Path) -> None:
            seen.extend([target] * (target.name == name))
            if len(seen) == count and not renamed:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)
            if len(seen) == count:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = counting  # type: ignore[assignment]
        with contextlib.suppress(BaseException):
            step()
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, f"{name} not written {count} times"


@pytest.fixture(scope="module")
def undisturbed(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    fit(recipe, out)
    return out


def test_killed_and_continued_it_ends_the_same(recipe: Recipe, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name, count, renamed in KILLS:
        killed(name, count, renamed, lambda: fit(recipe, out))
        left = [path for path in out.iterdir() if path.suffix == atomic.PART]
        assert len(left) == (not renamed), "one part of a file, and only where it had not become one"
        for state in out.glob("*.state"):
            assert torch.load(state, weights_only=True)["epoch"] >= 1
        if (out / "float.json").is_file():
            assert read_training_key(out / "float.safetensors") is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hadaptive_q.train.loop.save_state", lambda *_: pytest.fail("an epoch that was done before"))
        fit(recipe, out)
    assert {path.name for path in out.iterdir()} == {path.name for path in undisturbed.iterdir()}
    for name in ("float.safetensors", "float.json", "quantized.safetensors"):
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes(), name


def test_a_run_in_a_finished_folder_takes_its_report_away_first(
    recipe: Recipe, undisturbed: Path, tmp_path: Path
) -> None:
    """Killed on its way, it must not leave the report of other files."""
    for name in ("float.safetensors", "float.json"):
        (tmp_path / name).write_bytes((undisturbed / name).read_bytes())
    (tmp_path / "report.json").write_text("{}")
    killed("recipe.yaml", 1, False, lambda: pipeline.quantize(recipe, tmp_path))
    assert not (tmp_path / "report.json").exists()
    assert (tmp_path / "float.json").exists(), "the float network is the same and stays"


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(images: Path, tmp_path: Path) -> None:
    """In each, sets of texts have an order of their own."""
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    command = [sys.executable, "-m", "hadaptive_q", "qat", "--data", str(images), "--to", "pte,onnx", *settings]
    folders = [tmp_path / seed for seed in ("1", "2")]
    for folder in folders:
        environment = {**os.environ, "PYTHONHASHSEED": folder.name, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, "--out", str(folder)], env=environment, check=True, capture_output=True)
    one, other = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert one.keys() == other.keys()
    assert not [name for name in one if name.startswith(".") or name.endswith(".state")]
    # Reports have the time an inference took.
    reports = {"report.json", "report.md", "report.html"}
    assert {name for name in one if one[name] != other[name]} <= reports
    ours, theirs = (json.loads(files["report.json"]) for files in (one, other))
    assert ours.pop("latency").keys() == theirs.pop("latency").keys()
    assert ours == theirs


@pytest.mark.parametrize(
    ("kept", "said"), [([], "nothing yet"), (["float.safetensors", "qat.state"], "float.safetensors, qat.state")]
)
@pytest.mark.parametrize(("command", "run"), [(["qat"], "."), (["--quiet", "compare", "starnet_nano"], "starnet_nano")])
def test_control_c_says_what_is_kept(
    kept: list[str],
    said: str,
    command: list[str],
    run: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / run

    def interrupted(*_: object) -> None:
        for name in kept:
            (folder / name).touch()
        with atomic.replacing(folder / "model.pte"):
            with contextlib.suppress(Exception):  # as from C++ that cannot pass an exception on
                os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("went on")

    # A job in the background is born deaf to Ctrl-C; these tests may be one.
    deaf = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(pipeline, "_quantize", interrupted)
    monkeypatch.setattr(sys, "argv", ["hadaptive-q", *command, "--out", str(tmp_path)])
    monkeypatch.setattr(os, "_exit", sys.exit)
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        signal.signal(signal.SIGINT, deaf)
    assert ended.value.code == 130
    wanted = f"hadaptive-q: interrupted; {folder} keeps {said}; the same command goes on from there\n"
    assert capfd.readouterr().err == wanted
    assert {path.name for path in folder.iterdir()} == set(kept)
    assert not any(tmp_path.rglob(f"*{atomic.LOCK}"))
