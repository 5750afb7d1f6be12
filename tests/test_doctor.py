"""What the doctor finds in this environment, and in broken ones."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement

from hadaptive_q import doctor
from hadaptive_q.__main__ import main
from hadaptive_q.doctor import Finding, examine, listing, works

REQUIRES = ["torch>=2.13,<2.14", "numpy", 'onnx>=99; extra == "onnx"', 'mypy; extra == "dev"']


@pytest.fixture
def loading(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str], str], None]:
    """Return a function that sets what the other Python prints and fails with."""

    def answer(lines: list[str], error: str) -> None:
        monkeypatch.setattr(doctor, "_python", lambda *_: (lines, error))

    answer(["torch", "torchao", "executorch", "[]"], "")
    return answer


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, loading: Any) -> dict[str, str | None]:
    """The versions of an environment, to be changed; the package wants `REQUIRES`."""
    found: dict[str, str | None] = {"torch": "2.13.0+cpu", "numpy": "2.4.6", "onnx": "1.23"}

    def version(name: str) -> str | None:
        if name not in found:
            raise metadata.PackageNotFoundError(name)
        return found[name]

    own = SimpleNamespace(__getitem__=None, get_all=lambda _: ["onnx", "dev"])
    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", lambda _: REQUIRES)
    monkeypatch.setattr(metadata, "metadata", lambda _: _Metadata(own.get_all))
    return found


class _Metadata:
    def __init__(self, get_all: Any) -> None:
        self.get_all = get_all

    def __getitem__(self, key: str) -> str:
        return {"Requires-Python": ">=3.11"}[key]


def named(name: str) -> Finding:
    (found,) = (finding for finding in examine() if finding.name == name)
    return found


def test_this_environment_does_the_main_job(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """The whole command in earnest: versions, imports, and a network that is lowered and run."""
    monkeypatch.setattr(sys, "argv", ["hadaptive-q", "doctor", "--run", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    findings = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert ended.value.code == 0, findings
    wanted = {Requirement(line).name for line in metadata.requires("hadaptive-q") or () if "extra ==" not in line}
    assert {"python", "imports", "processor", "accelerator", "trial", "bench --core", *wanted} <= findings.keys()
    assert findings["torch"]["detail"].startswith(metadata.version("torch"))
    assert findings["trial"]["detail"].endswith("8 of 8 images as the integer interpreter")


def test_a_fitting_environment(installed: dict[str, str | None]) -> None:
    findings = examine()
    assert works(findings)
    assert named("torch") == Finding(
        "torch", "ok", "2.13.0+cpu, wants <2.14,>=2.13", True, 'pip install "torch<2.14,>=2.13"'
    )
    assert not [finding for finding in findings if finding.name == "extra dev"], "not for users"


@pytest.mark.parametrize(
    ("version", "state"), [("2.14.0", "wrong"), ("2.12.1", "wrong"), (None, "wrong"), ("absent", "missing")]
)
def test_what_does_not_fit_is_named_with_its_command(
    installed: dict[str, str | None], version: str | None, state: str
) -> None:
    installed["torch"] = version
    if version == "absent":
        del installed["torch"]
    found = named("torch")
    assert (found.state, found.remedy) == (state, 'pip install "torch<2.14,>=2.13"')
    assert not works(examine())
    assert '-> pip install "torch<2.14,>=2.13"' in listing(examine())


def test_optional_parts_do_not_fail(installed: dict[str, str | None]) -> None:
    found = named("extra onnx")
    assert (found.state, found.remedy) == ("wrong", 'pip install "onnx>=99"')
    assert works(examine())
    assert "extra onnx             wrong (optional): onnx 1.23, wants >=99" in listing(examine())


@pytest.mark.parametrize(
    ("lines", "error", "culprit"),
    [([], "a crash (signal 11)", "torch"), (["torch"], "ImportError: no symbol", "torchao")],
)
def test_what_does_not_load(
    installed: dict[str, str | None], loading: Any, lines: list[str], error: str, culprit: str
) -> None:
    loading(lines, error)
    found = named("imports")
    assert (found.state, found.detail) == ("wrong", f"{culprit} does not load: {error}")
    assert not works(examine())


def test_a_checkout_that_is_not_installed(loading: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    for function in ("metadata", "requires", "version"):
        monkeypatch.setattr(metadata, function, absent)
    assert named("hadaptive-q").remedy == "pip install ."
    assert not works(examine())


def test_matplotlib_without_fonts(loading: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda _: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    assert named("fonts of --data glyphs").state == "missing"


def test_another_python_that_fails() -> None:
    assert doctor._python("-c", "print(1)") == (["1"], "")
    assert doctor._python("-c", "print(1); raise ValueError('why')") == (["1"], "ValueError: why")
    assert doctor._python("-c", "import os; os.kill(os.getpid(), 11)") == ([], "a crash (signal 11)")
