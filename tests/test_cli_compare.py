"""The command `compare` as a user meets it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hadaptive_q.__main__ import main
from hadaptive_q.models.checkpoint import save_model
from hadaptive_q.models.families import create_model

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Return a function that runs `compare` in an empty folder and gives exit code, output and errors."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hadaptive-q", "--quiet", "compare", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


@pytest.fixture
def two_classes(tmp_path: Path) -> str:
    torch.manual_seed(0)
    save_model(create_model("hadaptive_net_nano", 2), tmp_path / "few.safetensors")
    return "few.safetensors"


def test_a_finished_run_alone(command: Command, nano_run: Any, tmp_path: Path) -> None:
    code, out, err = command(str(nano_run.folder))
    assert (code, err) == (0, "")
    assert f"{nano_run.report.accuracy.pte_top1:.2f}" in out
    assert f"{nano_run.report.size.pte_bytes:,}" in out
    assert out.splitlines()[-1] == "page: runs/compare-digits/compare.html"
    assert (tmp_path / "runs" / "compare-digits" / "compare.html").is_file()


def test_a_failure_among_others_as_json(command: Command, nano_run: Any, two_classes: str, tmp_path: Path) -> None:
    code, out, err = command(two_classes, str(nano_run.folder), "--out", "out", "--json")
    assert (code, err) == (1, "")
    record = json.loads(out)
    assert [each["name"] for each in record["models"]] == ["run"]
    assert [each["name"] for each in record["failed"]] == ["few"]
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == record


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["hadaptive_net_xs"], ["hadaptive_net_xs", "'hadaptive_net_s'"]),
        (["starnet_s1", "starnet_s1"], ["starnet_s1", "second time"]),
        (["starnet_s1", "--core", "cortex-a7"], ["cortex-a7", "cortex-a76"]),
        (["starnet_s1", "--recipe", "int9"], ["int9"]),
        (["starnet_s1", "--recipe", "float"], ["a recipe for train"]),
        (["starnet_s1", "--recipe", "starnet_s2=int8"], ["starnet_s2", "'starnet_s1'"]),
        (["starnet_s1", "--set", "fit.epoch=3"], ["fit.epoch", "'epochs'"]),
        (["starnet_s1", "--data", "digit"], ["--data", "'digits'"]),
        (["few.safetensors"], ["nothing but failures", "2 classes"]),
        (["."], ["no recipe.yaml", "finished qat or ptq run"]),
        (["starnet_s1", "--out", "few.json"], ["--out few.json"]),
    ],
    ids=str,
)
def test_mistakes_get_one_line(command: Command, two_classes: str, arguments: list[str], words: list[str]) -> None:
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    for word in words:
        assert word in line
    assert not list(Path().rglob("*.pte"))
