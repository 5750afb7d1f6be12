"""Budgets: kept, broken, and wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hadaptive_q.errors import UserError
from hadaptive_q.regress import check_budgets, figures
from hadaptive_q.report.record import read_report


def test_every_number_of_a_report_can_be_a_budget(nano_run: Any) -> None:
    found = figures(read_report(nano_run.folder))
    report = json.loads((nano_run.folder / "report.json").read_text())
    assert found["coverage.delegates"] == report["coverage"]["delegates"] == 1
    assert found["coverage.fp32_ops"] == len(report["coverage"]["fp32_ops"]) > 0
    assert found["coverage.transposes"] == report["coverage"]["transposes"]
    assert found["size.ratio"] == report["size"]["pte_bytes"] / report["size"]["float_pte_bytes"]
    assert found["accuracy.drop"] == report["accuracy"]["float_top1"] - report["accuracy"]["pte_top1"]


def test_kept_and_broken_budgets(nano_run: Any) -> None:
    report = read_report(nano_run.folder / "report.json")
    kept = ["coverage.delegates == 1", "coverage.portable_ops==0", " size.ratio < 1e0 ", "accuracy.samples >= 1"]
    assert check_budgets(report, kept) == []
    (broken,) = check_budgets(report, [*kept, "coverage.fp32_ops == 0"])
    assert str(broken) == f"coverage.fp32_ops == 0: it is {len(report.coverage.fp32_ops)}"
    assert check_budgets(report, ["coverage.delegates > 1"])
    assert check_budgets(report, ["coverage.delegates < 1"])
    assert not check_budgets(report, ["coverage.delegates <= 1"])


@pytest.mark.parametrize(
    ("budget", "answer"),
    [
        ("coverage.delegates", "KEY OPERATOR NUMBER"),
        ("coverage.delegates = 1", "KEY OPERATOR NUMBER"),
        ("coverage.delegate == 1", "coverage.delegates"),
        ("model == 1", "no figure model"),
        ("size.ratio < 1.2.3", "a number"),
    ],
)
def test_a_wrong_budget_is_named(nano_run: Any, budget: str, answer: str) -> None:
    with pytest.raises(UserError, match=answer):
        check_budgets(read_report(nano_run.folder), [budget])


@pytest.mark.parametrize("content", [None, "", "{}", "[1", "\x00"])
def test_what_is_no_report_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(UserError, match=r"report\.json"):
        read_report(tmp_path)
