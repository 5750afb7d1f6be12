"""Work in a child process: answers and refusals come back, and a child that dies takes nothing with it."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from hadaptive_q.errors import UserError
from hadaptive_q.lower.isolated import isolated

WORK = """
import ctypes, os, time
from hadaptive_q.errors import UserError

def add(a, b):
    print("noise on standard output")
    return {"sum": a + b, "process": os.getpid()}

def refuse(name):
    raise UserError(f"file {name}", "nothing", "something", "write it")

def crash():
    ctypes.string_at(0)

def fail():
    raise KeyError("a bug of ours")

def hang():
    time.sleep(60)
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    (tmp_path / "work_of_a_child.py").write_text(WORK)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("work_of_a_child")
    del sys.modules["work_of_a_child"]


def test_the_answer_comes_from_another_process(work: ModuleType) -> None:
    answer = isolated(work.add, "file a.pte", 2, 0.5)
    assert answer["sum"] == 2.5
    assert answer["process"] != os.getpid()


def test_a_refusal_is_the_same_error_here(work: ModuleType) -> None:
    with pytest.raises(UserError) as refused:
        isolated(work.refuse, "file a.pte", "b.pte")
    assert str(refused.value) == "file b.pte: got nothing; expected something; write it"


def test_a_crash_is_one_line(work: ModuleType) -> None:
    with pytest.raises(UserError, match=r"^file a\.pte: got its runtime died of SIGSEGV; expected "):
        isolated(work.crash, "file a.pte")


def test_a_bug_keeps_its_traceback(work: ModuleType) -> None:
    with pytest.raises(RuntimeError, match=r"a\.pte.*\n(?s:.*)KeyError: 'a bug of ours'"):
        isolated(work.fail, "file a.pte")


def test_one_that_hangs_is_ended(work: ModuleType) -> None:
    with pytest.raises(UserError, match=r"no answer in 0\.5 seconds"):
        isolated(work.hang, "file a.pte", limit_s=0.5)


def test_the_current_folder_is_not_imported_from(
    work: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "stranger"
    folder.mkdir()
    (folder / "json.py").write_text("raise SystemExit('code of a stranger ran')")
    monkeypatch.chdir(folder)
    assert isolated(work.add, "file a.pte", 1, 1)["sum"] == 2
