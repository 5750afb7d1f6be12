"""The pages say what is so: links lead somewhere, commands parse, recipes and messages exist, nothing is stale."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml
from packaging.requirements import Requirement

from hadaptive_q.arm.cores import CORES
from hadaptive_q.cli import app
from hadaptive_q.examples import EXAMPLES
from hadaptive_q.lower.file_formats import FORMATS
from hadaptive_q.recipe import load_recipe
from hadaptive_q.regress import _BUDGET

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WORKFLOW = ROOT / "docs" / "github-actions.yml"
GROUP: Any = typer.main.get_command(app)


def check_command(line: str) -> None:
    """Parse `hadaptive-q ...` as the command line does, short of running it, and load the recipe it names."""
    words = shlex.split(line, comments=True)
    while words[1].startswith("-"):
        assert words.pop(1) in {option for parameter in GROUP.params for option in parameter.opts}, line
    name = words[1]
    values = GROUP.commands[name].make_context(name, words[2:], parent=click.Context(GROUP)).params
    named = values.get("recipe") or []
    for recipe in [named] if isinstance(named, str) else named:
        task = load_recipe(recipe.rpartition("=")[2], values.get("set_")).task
        assert name in (task, "search", "compare"), line
    cores = values.get("core") or []
    assert {cores} <= CORES.keys() if isinstance(cores, str) else set(cores) <= CORES.keys(), line
    assert set((values.get("to") or "pte").split(",")) <= FORMATS.keys(), line
    assert all(_BUDGET.fullmatch(budget) for budget in values.get("budget") or []), line


def blocks(page: Path) -> list[str]:
    """Return the lines of a page's shell examples."""
    found = re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [part for block in found for line in block.splitlines() for part in line.split(" && ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_only_what_exists(page: Path) -> None:
    text = page.read_text()
    for path in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / path).exists(), path
    for path in re.findall(r"python ((?:benchmarks|docs)/\S+\.py)", text):
        assert (ROOT / path).exists(), path
    for command in (line for line in blocks(page) if line.startswith("hadaptive-q ")):
        check_command(command)
    for command in re.findall(r"`hadaptive-q ([^`]+)`", text):
        name, *words = command.split()
        assert name in GROUP.commands, command
        options = {option for parameter in GROUP.commands[name].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, command


@pytest.mark.parametrize("name", ["README.md", "quickstart.md"])
def test_pages_show_commands(name: str) -> None:
    (page,) = (page for page in PAGES if page.name == name)
    assert sum(line.startswith("hadaptive-q ") for line in blocks(page)) >= 6


@pytest.mark.parametrize("name", GROUP.commands)
def test_the_help_of_every_command_closes_with_examples(name: str) -> None:
    command = GROUP.commands[name]
    shown = command.get_help(click.Context(command, info_name=name, parent=click.Context(GROUP)))
    assert EXAMPLES[name]
    for example in EXAMPLES[name]:
        assert f"  hadaptive-q {example}\n" in f"{shown}\n", "on a line of its own"
        assert example.split()[0] == name
        check_command(f"hadaptive-q {example}")


def test_the_workflow_runs_what_the_command_line_has() -> None:
    workflow = yaml.safe_load(WORKFLOW.read_text())
    steps = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    ours = [step for step in steps if step.startswith("hadaptive-q ")]
    for command in ours:
        check_command(command)
    assert [name for step in ours for name in step.split() if name in GROUP.commands] == ["doctor", "ptq", "check"]
    out, checked = (re.search(pattern, " ".join(ours)) for pattern in (r"--out (\S+)", r"check (\S+)"))
    assert out
    assert checked
    assert out[1] == checked[1]


@pytest.mark.parametrize("page", [WORKFLOW, ROOT / "docs" / "quickstart.md"], ids=lambda page: page.name)
def test_torch_is_installed_first_and_within_the_pins(page: Path) -> None:
    installs = re.findall(r"pip install (.+)", page.read_text())
    (pin,) = re.findall(r'^    "(torch>.*)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    first = Requirement(shlex.split(installs[0])[0])
    assert (first.name, first.specifier) == ("torch", Requirement(pin).specifier)


def test_the_interface_page_is_what_the_docstrings_say() -> None:
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(), "stale: python docs/make_api.py"


def messages() -> set[str]:
    """Return the messages of every UserError in the source, with … for what differs."""
    found = set()
    for path in (ROOT / "hadaptive_q").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "UserError":
                where, got, expected = (*map(_text, node.args), "…", "…")[:3]  # one passed on whole says nothing
                found.add(f"{where}: got {got}; expected {expected}")
    return found


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    return str(node.value) if isinstance(node, ast.Constant) else "…"


def test_troubleshooting_quotes_real_messages() -> None:
    headings = re.findall(r"^### `(.+)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(headings) == len(set(headings)) >= 25
    assert not set(headings) - messages()
