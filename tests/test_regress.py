"""Budgets: kept, broken, and wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hadaptive_q import regress
from hadaptive_q.arm.count import Counts
from hadaptive_q.changes import GAIN_CHANGE
from hadaptive_q.cli import app
from hadaptive_q.errors import UserError
from hadaptive_q.regress import NAMES, figures, hold, named_budgets, parse_budgets
from hadaptive_q.report.answers import record_answers
from hadaptive_q.report.record import LayerBytesRecord, LayerRecord, Report, read_report

SAMPLES = 359


@pytest.fixture
def made(nano_run: Any) -> Report:
    """A report with eight layers, on 359 images that float and file all have right; it may be changed."""
    layers = [
        LayerRecord(
            name=f"conv_{i}",
            origin=f"blocks.{i}",
            sqnr_db=30.0,
            local_sqnr_db=40.0,
            gain=1.0,
            low=-1.0,
            high=1.0,
            scale=0.01,
        )
        for i in range(8)
    ]
    ach = nano_run.report.ach[0].model_copy(update={"name": "blocks.1", "flip_rate": 0.01})
    report: Report = nano_run.report.model_copy(deep=True, update={"layers": layers, "weights": [], "ach": [ach]})
    report.parity.integer_identical = 1.0
    return answered(report, 0, 0)


def answered(report: Report, lost: int, won: int) -> Report:
    """Return `report` with the file wrong where float is right on `lost` images, and the other way on `won`."""
    before = [index >= won for index in range(SAMPLES)]
    after = [index < SAMPLES - lost for index in range(SAMPLES)]
    tops = {"float_top1": 100 * sum(before) / SAMPLES, "pte_top1": 100 * sum(after) / SAMPLES, "samples": SAMPLES}
    answers = record_answers("images", [0] * SAMPLES, before, after)
    return report.model_copy(
        update={"accuracy": report.accuracy.model_copy(update=tops), "answers": answers}, deep=True
    )


def write(folder: Path, report: Report) -> Path:
    folder.mkdir()
    report.write(folder / "report.json")
    return folder


def changed(change: Callable[[Report], object]) -> Callable[[Report], Report]:
    def apply(report: Report) -> Report:
        other = report.model_copy(deep=True)
        change(other)
        return other

    return apply


def grow(report: Report) -> None:
    report.size.pte_bytes += report.size.pte_bytes // 10
    report.coverage.layers[:0] = [LayerBytesRecord(layer="blocks.1.more", weights=10**6, biases=0, scales=0)]


# By the default budget that each breaks alone.
FAULTS: dict[str, Callable[[Report], Report]] = {
    "parity.integer_identical": changed(lambda report: setattr(report.parity, "integer_identical", 0.5)),
    # Float does as badly: the file follows it, and is still worse than the one before.
    "baseline.drop": lambda report: report.model_copy(
        update={"answers": record_answers("images", [0] * SAMPLES, *[[i > 9 for i in range(SAMPLES)]] * 2)}
    ),
    "baseline.size_ratio": changed(grow),
    "baseline.fallbacks": changed(lambda report: report.coverage.portable_ops.append("mean")),
    "baseline.recoded": changed(
        lambda report: report.layers.append(report.layers[0].model_copy(update={"name": "mean", "origin": "blocks.1"}))
    ),
    "baseline.sqnr_fall": changed(lambda report: setattr(report.layers[1], "local_sqnr_db", 25.0)),
    "baseline.gain_change": changed(lambda report: setattr(report.layers[1], "gain", 0.99)),
    "baseline.flip_rise": changed(lambda report: setattr(report.ach[0], "flip_rate", 0.5)),
}


def test_every_number_of_a_report_can_be_a_budget(nano_run: Any) -> None:
    found = figures(read_report(nano_run.folder))
    report = json.loads((nano_run.folder / "report.json").read_text())
    assert found["coverage.delegates"] == report["coverage"]["delegates"] == 1
    assert found["coverage.fp32_ops"] == len(report["coverage"]["fp32_ops"]) > 0
    assert found["coverage.transposes"] == report["coverage"]["transposes"]
    assert found["size.ratio"] == report["size"]["pte_bytes"] / report["size"]["float_pte_bytes"]
    assert found["accuracy.drop"] == report["accuracy"]["float_top1"] - report["accuracy"]["pte_top1"]


def test_kept_and_broken_budgets(nano_run: Any) -> None:
    kept = ["coverage.delegates == 1", "coverage.portable_ops==0", " size.ratio < 1e0 ", "accuracy.samples >= 1"]
    assert hold(nano_run.folder / "report.json", kept).broken == []
    outcome = hold(nano_run.folder, [*kept, "coverage.fp32_ops == 0"])
    (broken,) = outcome.broken
    assert str(broken) == f"coverage.fp32_ops == 0: it is {len(nano_run.report.coverage.fp32_ops)}"
    assert outcome.as_json()[0]["budget"] == "coverage.fp32_ops == 0"
    assert str(outcome).endswith("4 of 5 budgets kept")
    assert hold(nano_run.folder, ["coverage.delegates > 1"]).broken
    assert hold(nano_run.folder, ["coverage.delegates < 1"]).broken
    assert not hold(nano_run.folder, ["coverage.delegates <= 1"]).broken


@pytest.mark.parametrize(
    ("budget", "answer"),
    [
        ("coverage.delegates", "KEY OPERATOR NUMBER"),
        ("coverage.delegates = 1", "KEY OPERATOR NUMBER"),
        ("coverage.delegate == 1", "coverage.delegates"),
        ("model == 1", "no figure model"),
        ("settings.seed == 0", "no figure settings"),
        ("baseline.drop <= 1", "--baseline FILE"),
        ("size.ratio < 1.2.3", "a number"),
    ],
)
def test_a_wrong_budget_is_named(nano_run: Any, budget: str, answer: str) -> None:
    with pytest.raises(UserError, match=answer):
        hold(nano_run.folder, [budget])


def test_marker_keywords_are_budgets() -> None:
    assert named_budgets({"max_drop": 0.5, "min_agreement": 1}) == [
        "accuracy.drop <= 0.5",
        "parity.float_agreement >= 1.0",
    ]
    assert all(parse_budgets(named_budgets({name: 1})) for name in NAMES)
    with pytest.raises(UserError, match="did you mean 'max_flip'"):
        named_budgets({"max_flips": 1})


@pytest.mark.parametrize(
    ("lost", "won", "limit", "verdict", "says"),
    [
        (0, 0, 2.0, "kept", "-1.06 to"),
        (0, 0, 0.5, "undecided", "359 images cannot tell 0.5 points, at least 7"),
        (1, 0, 0.5, "undecided", "at least 3"),
        (2, 0, 0.5, "broken", "cannot tell"),  # 0.56 points: over the budget, if not surely
        (9, 0, 0.5, "broken", "95 %"),
        (0, 9, 0.0, "kept", "95 %"),
    ],
)
def test_a_drop_is_kept_broken_or_undecided(
    tmp_path: Path, made: Report, lost: int, won: int, limit: float, verdict: str, says: str
) -> None:
    run = write(tmp_path / "run", answered(made, lost, won))
    for strict in (False, True):
        outcome = hold(run, [f"accuracy.drop <= {limit}"], strict=strict)
        (held,) = outcome.held
        assert held.verdict == verdict
        assert says in held.note
        assert bool(outcome.broken) == (verdict == "broken" or (strict and verdict == "undecided"))


def test_instructions_are_counted_where_a_budget_asks(
    tmp_path: Path, made: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = {"model.pte": 30, "float.pte": 100}
    asked = []

    def count(path: Path, core: str) -> Counts:
        asked.append(path.parent)
        return Counts(counted[path.name], {})

    monkeypatch.setattr(regress, "count_instructions", count)
    run = write(tmp_path / "run", made)
    assert not hold(run, ["size.ratio <= 1"]).broken
    assert not asked
    (held,) = hold(run / "report.json", named_budgets({"max_instruction_ratio": 0.25})).broken
    assert held.figure == pytest.approx(0.3)
    assert asked == [run, run]


def test_a_run_keeps_the_defaults_against_itself(tmp_path: Path, made: Report) -> None:
    run, file = write(tmp_path / "run", made), tmp_path / "kept" / "gate.json"
    outcome = hold(run, ["size.ratio <= 0.001"], file, update=True)
    assert [held.key for held in outcome.broken] == ["size.ratio"]
    assert not file.exists(), "a run that breaks its budgets is no baseline"
    assert not hold(run, [], file, update=True).broken
    assert not hold(run, [], file).broken


@pytest.mark.parametrize("fault", FAULTS)
def test_every_default_budget_breaks_and_names_the_guilty(tmp_path: Path, made: Report, fault: str) -> None:
    file = tmp_path / "gate.json"
    hold(write(tmp_path / "before", made), [], file, update=True)
    outcome = hold(write(tmp_path / "after", FAULTS[fault](made)), [], file)
    assert [held.key for held in outcome.broken] == [fault]
    assert bool(outcome.guilty) == (fault != "baseline.drop")
    if outcome.guilty:
        assert outcome.guilty[0].startswith(("blocks.1", "mean outside", "lowering"))
        assert outcome.guilty[0] in str(outcome)


def test_a_budget_replaces_the_default_of_its_key(tmp_path: Path, made: Report) -> None:
    file = tmp_path / "gate.json"
    hold(write(tmp_path / "before", made), [], file, update=True)
    larger = write(tmp_path / "after", FAULTS["baseline.size_ratio"](made))
    assert hold(larger, [], file).broken
    assert not hold(larger, ["baseline.size_ratio <= 2"], file).broken


def test_at_most_five_layers_are_named_the_worst_first(tmp_path: Path, made: Report) -> None:
    file = tmp_path / "gate.json"
    hold(write(tmp_path / "before", made), [], file, update=True)
    for index, layer in enumerate(made.layers):
        layer.local_sqnr_db = 40.0 - 3 * index
    outcome = hold(write(tmp_path / "after", made), [], file)
    assert [line.split(" ")[0] for line in outcome.guilty] == [f"blocks.{i}" for i in (7, 6, 5, 4, 3)]
    assert "SQNR 40.0 -> 19.0 dB, gain 1.0000 -> 1.0000" in outcome.guilty[0]


@pytest.mark.parametrize("content", [None, "", "{}", "[1", "\x00"])
def test_what_is_no_report_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(UserError, match=r"report\.json"):
        read_report(tmp_path)


def test_the_command_line_holds_writes_and_refuses(tmp_path: Path, made: Report) -> None:
    run, file = write(tmp_path / "run", made), tmp_path / "gate.json"
    invoke = partial(CliRunner().invoke, app)
    written = invoke(["check", str(run), "--baseline", str(file), "--update-baseline"])
    assert written.exit_code == 0, written.output
    assert "9 of 9 budgets kept" in written.output
    worse = write(tmp_path / "worse", FAULTS["baseline.gain_change"](made))
    failed = invoke(["check", str(worse), "--baseline", str(file), "--json"])
    assert failed.exit_code == 1
    (broken,) = json.loads(failed.output)
    assert broken["budget"] == f"baseline.gain_change <= {GAIN_CHANGE}"
    assert broken["figure"] == pytest.approx(0.01)
    assert broken["guilty"] == ["blocks.1 (conv_1): SQNR 40.0 -> 40.0 dB, gain 1.0000 -> 0.9900"]
    for arguments in ([], ["--update-baseline"]):
        assert isinstance(invoke(["check", str(run), *arguments]).exception, UserError)
