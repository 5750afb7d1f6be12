"""Baselines: what they keep, and which are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hadaptive_q.baseline import Baseline, make_baseline, read_baseline
from hadaptive_q.errors import UserError
from hadaptive_q.report.answers import unpack


@pytest.fixture
def now(nano_run: Any) -> Baseline:
    return make_baseline(nano_run.report, "run")


def test_a_baseline_keeps_what_the_report_says(nano_run: Any, now: Baseline, tmp_path: Path) -> None:
    report = nano_run.report
    file = tmp_path / "new" / "gate.json"
    now.write(file)
    assert read_baseline(file, now) == now
    assert [path.name for path in file.parent.iterdir()] == ["gate.json"]
    right = unpack(now.right, now.samples)
    assert 100 * right.mean() == pytest.approx(report.accuracy.pte_top1)
    assert now.pte_bytes == (nano_run.folder / "model.pte").stat().st_size
    assert sum(now.fallbacks.values()) == len(report.coverage.fp32_ops)
    tensors = {layer.name for layer in report.layers} | {f"{weight.name}.weight" for weight in report.weights}
    assert now.gain.keys() == now.sqnr_db.keys() == tensors
    # A figure a line: an update shows what it accepts.
    assert all(line.count(":") <= 2 for line in file.read_text().splitlines())


def test_other_seeds_and_other_calibration_are_the_same_kind_of_run(nano_run: Any, now: Baseline) -> None:
    settings = nano_run.report.settings
    other = settings | {"seed": 9, "name": "copy", "calibration": settings["calibration"] | {"manifest": "my.yaml"}}
    again = nano_run.report.model_copy(update={"settings": other, "seed": 9})
    assert make_baseline(again, "run").kind() == now.kind()


@pytest.mark.parametrize(
    ("key", "value", "answer"),
    [
        ("versions", {"torch": "1.0"}, r"versions.torch: got \"1.0\"; expected \"2"),
        ("model", "hadaptive_net_l", r"model: got \"hadaptive_net_l\""),
        ("data", "glyphs", r"data: got \"glyphs\"; expected \"digits\""),
        ("split", "sha256:0", "split: got"),
        ("settings", {"quantize.observer": "minmax"}, r"settings.quantize.observer: got \"minmax\""),
        ("settings", {"fit.epochs": 3}, "settings.fit.epochs: got 3; expected nothing"),
        ("input", {"dtype": "uint8", "shape": [1]}, r"input.dtype: got \"uint8\""),
        ("gain", "none", "gain: got 'Input should be"),
        ("colour", "red", "colour: got 'Extra inputs"),
        ("format", 2, "format: got"),
    ],
)
def test_a_baseline_of_another_kind_is_refused(
    now: Baseline, tmp_path: Path, key: str, value: Any, answer: str
) -> None:
    content = now.model_dump(mode="json")
    file = tmp_path / "gate.json"
    merged = content[key] | value if isinstance(value, dict) else value
    file.write_text(json.dumps(content | {key: merged}))
    with pytest.raises(UserError, match=answer) as refused:
        read_baseline(file, now)
    assert "--update-baseline" in str(refused.value)


@pytest.mark.parametrize("content", [None, b"", b"[1", b"\xff"])
def test_what_is_no_baseline_is_refused(now: Baseline, tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "gate.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"gate\.json"):
        read_baseline(file, now)


def test_an_old_report_makes_no_baseline(nano_run: Any) -> None:
    with pytest.raises(UserError, match="run it again"):
        make_baseline(nano_run.report.model_copy(update={"answers": None}), "run")
