"""The gate as a pytest plugin: a marker that holds a run against budgets and a committed baseline.

    @pytest.mark.quant_gate(run="runs/mine", baseline="gate.json", max_drop=0.5)
    def test_the_file_that_ships(quant_gate): ...

Everything but pytest is imported when a gate runs: other tests start as fast as without it.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from hadaptive_q.regress import Outcome

MARKER = "quant_gate"
SOURCES = ("run", "recipe", "checkpoint", "data", "set", "baseline", "strict")
OUTCOME = pytest.StashKey["Outcome"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --update-baseline and --quant-strict."""
    group = parser.getgroup("hadaptive-q")
    group.addoption("--update-baseline", action="store_true", help="make the runs of quant_gate tests their baselines")
    group.addoption("--quant-strict", action="store_true", help="budgets that too few images can decide are broken")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line(
        "markers",
        f"{MARKER}(run=None, recipe=None, checkpoint=None, data=None, set=(), baseline=None, strict=False, **budgets):"
        " hold a run against budgets and a baseline (hadaptive-q, docs/gate.md)",
    )


def pytest_itemcollected(item: pytest.Item) -> None:
    """Give every test with the marker the fixture."""
    names = getattr(item, "fixturenames", None)
    if names is not None and item.get_closest_marker(MARKER) and MARKER not in names:
        names.append(MARKER)


@pytest.fixture
def quant_gate(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Run the gate of the test's marker and return its outcome; the test fails before its body where it is broken."""
    from hadaptive_q.errors import UserError

    marker = request.node.get_closest_marker(MARKER)
    if marker is None or marker.args:
        pytest.fail(f"a test that uses {MARKER} needs @pytest.mark.{MARKER}(run=...), keywords only", pytrace=False)
    try:
        outcome = _hold(request.config, marker.kwargs, tmp_path_factory)
    except UserError as error:
        pytest.fail(str(error), pytrace=False)
    request.node.stash[OUTCOME] = outcome
    return outcome


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Fail the test in the place of its body where its gate is broken."""
    outcome = item.stash.get(OUTCOME, None)
    if outcome is not None:
        if outcome.broken:
            pytest.fail(str(outcome), pytrace=False)
        item.add_report_section("call", MARKER, str(outcome))
        for held in outcome.undecided:
            item.warn(pytest.PytestWarning(f"undecided: {held}"))
    return (yield)


def _hold(config: pytest.Config, keywords: dict[str, Any], folders: pytest.TempPathFactory) -> Outcome:
    from hadaptive_q.regress import hold, named_budgets

    given = {name: value for name, value in keywords.items() if name in SOURCES}
    budgets = named_budgets({name: limit for name, limit in keywords.items() if name not in SOURCES}, SOURCES)
    baseline = config.rootpath / given["baseline"] if "baseline" in given else None
    update = baseline is not None and config.getoption("--update-baseline")
    strict = given.get("strict", config.getoption("--quant-strict"))
    return hold(_run(config, given, folders), budgets, baseline, update, strict)


def _run(config: pytest.Config, given: dict[str, Any], folders: pytest.TempPathFactory) -> Path:
    """Return the folder of the finished run that is given, or of the one that is made now."""
    from hadaptive_q.errors import UserError

    if ("run" in given) == ("recipe" in given):
        raise UserError(
            f"{MARKER}(...)", "both or neither of run= and recipe=", "one of them", "run= takes a finished run"
        )
    if "run" in given:
        return config.rootpath / str(given["run"])
    from hadaptive_q.recipe import load_recipe

    data = [f"data={_path(config, given['data'])}"] if "data" in given else []
    recipe = load_recipe(_path(config, given["recipe"]), [*data, *given.get("set", ())])
    if recipe.task == "train":
        raise UserError(f"{MARKER}(recipe={given['recipe']!r})", "a recipe for train", "one for ptq or qat")
    from hadaptive_q.pipeline import quantize

    folder = folders.mktemp(MARKER)
    quantize(recipe, folder, config.rootpath / given["checkpoint"] if "checkpoint" in given else None)
    return folder


def _path(config: pytest.Config, name: str) -> str:
    """Return `name` as a path from the root of the user's tests where there is one, else as it is."""
    path = config.rootpath / name
    return str(path) if path.exists() else name
