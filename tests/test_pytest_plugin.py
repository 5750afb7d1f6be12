"""The pytest plugin, from a repository of a user's own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hadaptive_q.models.checkpoint import save_model
from hadaptive_q.models.hadaptive_net import HadaptiveNet
from hadaptive_q.regress import DEFAULTS, NAMES

pytest_plugins = ["pytester"]


@pytest.fixture
def user(pytester: pytest.Pytester, nano_run: Any) -> pytest.Pytester:
    """A user's repository with a finished run in it."""
    folder = pytester.path / "runs" / "mine"
    folder.mkdir(parents=True)
    shutil.copy(nano_run.folder / "report.json", folder)
    return pytester


def gated(
    user: pytest.Pytester, keywords: str, *options: str, body: str = "(quant_gate): assert quant_gate.held"
) -> Any:
    user.makepyfile(f"import pytest\n\n@pytest.mark.quant_gate({keywords})\ndef test_the_file{body}\n")
    return user.runpytest_inprocess("-p", "hadaptive_q.pytest_plugin", "--strict-markers", *options)


def test_a_baseline_is_written_then_compared_with(user: pytest.Pytester) -> None:
    keywords = "run='runs/mine', baseline='gates/mine.json', max_size_ratio=1"
    missing = gated(user, keywords)
    missing.assert_outcomes(errors=1)
    missing.stdout.fnmatch_lines(["*gates/mine.json: got No such file*--update-baseline writes it*"])

    gated(user, keywords, "--update-baseline").assert_outcomes(passed=1)
    file = user.path / "gates" / "mine.json"
    kept = file.read_text()
    gated(user, keywords, body="(): pass").assert_outcomes(passed=1)
    assert file.read_text() == kept

    before = json.loads(kept)
    worst = next(iter(before["gain"]))
    file.write_text(json.dumps(before | {"gain": before["gain"] | {worst: before["gain"][worst] + 0.01}}))
    failed = gated(user, keywords)
    failed.assert_outcomes(failed=1)
    failed.stdout.fnmatch_lines(["broken*baseline.gain_change*", "changed most*", f"*({worst})*gain*"])
    # What was asked for and every default budget, once each.
    failed.stdout.fnmatch_lines([f"{len(DEFAULTS)} of {len(DEFAULTS) + 1} budgets kept"])

    file.write_text(json.dumps(before | {"model": "hadaptive_net_l"}))
    refused = gated(user, keywords)
    refused.assert_outcomes(errors=1)
    refused.stdout.fnmatch_lines(['*, model: got "hadaptive_net_l"; expected "hadaptive_net_nano"*'])


def test_a_recipe_is_run_and_held(user: pytest.Pytester, make_nano: Callable[..., HadaptiveNet]) -> None:
    save_model(make_nano(), user.path / "mine.safetensors")
    recipe = "recipe='int8_ptq', checkpoint='mine.safetensors', data='digits', set=['seed=7'], baseline='gate.json'"
    gated(user, f"{recipe}, max_size_ratio=1", "--update-baseline").assert_outcomes(passed=1)
    kept = json.loads((user.path / "gate.json").read_text())
    assert kept["model"] == "hadaptive_net_nano"
    gated(user, "run='runs/mine', baseline='gate.json'").assert_outcomes(errors=1)  # of another recipe: another seed


def test_budgets_alone_and_the_body(user: pytest.Pytester) -> None:
    broken = gated(user, "run='runs/mine', max_size_ratio=0.001")
    broken.assert_outcomes(failed=1)
    broken.stdout.fnmatch_lines(["broken*size.ratio <= 0.001*"])
    gated(user, "run='runs/mine', max_size_ratio=1", body="(): assert False").assert_outcomes(failed=1)
    # The nano network's split is far too small for a hundredth of a point.
    report = json.loads((user.path / "runs" / "mine" / "report.json").read_text())
    close = report["accuracy"]["float_top1"] - report["accuracy"]["pte_top1"] + 0.01
    few = gated(user, f"run='runs/mine', max_drop={close}", "-W", "default::pytest.PytestWarning")
    few.assert_outcomes(passed=1, warnings=1)
    few.stdout.fnmatch_lines(["*undecided: accuracy.drop*images cannot tell*"])
    gated(user, f"run='runs/mine', max_drop={close}", "--quant-strict").assert_outcomes(failed=1)


MISTAKES = {
    "run='runs/mine', max_dorp=1": "quant_gate(max_dorp=...): *did you mean 'max_drop'*",
    "run='runs/mine', base='x'": "quant_gate(base=...): *did you mean 'baseline'*",
    "run='runs/mine', max_drop='1'": "quant_gate(max_drop=...): got '1'; expected a number",
    "run='runs/mine'": "*nothing to hold it against*",
    "max_drop=1": "*neither of run= and recipe=*",
    "run='runs/other', max_drop=1": "report */runs/other*: got No such file*",
    "recipe='float', max_drop=1": "*a recipe for train*",
    "'runs/mine', max_drop=1": "*keywords only*",
}


def test_mistakes_are_named(user: pytest.Pytester) -> None:
    marked = [f"@pytest.mark.quant_gate({keywords})\ndef test_{i}(): pass\n" for i, keywords in enumerate(MISTAKES)]
    user.makepyfile("\n".join(["import pytest\n", *marked]))
    result = user.runpytest_inprocess("-p", "hadaptive_q.pytest_plugin")
    result.assert_outcomes(errors=len(MISTAKES))
    for answer in MISTAKES.values():
        result.stdout.fnmatch_lines([answer])
    assert "Traceback" not in result.stdout.str()


def test_pytest_starts_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys, pytest\n"
        "pytest.main(['-p', 'hadaptive_q.pytest_plugin', '--markers', '-q'])\n"
        "assert not {'torch', 'scipy', 'hadaptive_q.regress'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "quant_gate(" in done.stdout


def test_the_page_names_every_budget() -> None:
    page = (Path(__file__).parent.parent / "docs" / "gate.md").read_text()
    for name, budget in NAMES.items():
        assert f"`{name}`" in page, name
        assert f"`{budget}" in page, budget
    for default in DEFAULTS:
        assert f"`{default}`" in page, default
