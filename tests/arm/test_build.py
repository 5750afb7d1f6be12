"""The build in the cache: found tools, one winner of a race, nothing left behind."""

from __future__ import annotations

import subprocess
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hadaptive_q.arm import build
from hadaptive_q.arm.cores import CORES
from hadaptive_q.errors import UserError

TOOLS = build.Tools("qemu-aarch64", "aarch64-linux-gnu-g++", "cc", "qemu-aarch64 version 7.2.0")


def test_missing_programs_name_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert "apt-get install qemu-user" in build.missing()
    with pytest.raises(UserError, match="no qemu-aarch64, aarch64-linux-gnu-g"):
        build.find_tools()


@pytest.mark.parametrize(
    ("version", "options", "fits"),
    [
        ("7.2.22 (Debian)", "-cpu -plugin", True),
        ("7.0.0", "-cpu -plugin", False),
        ("9.0.0", "-cpu -plugin", False),
        ("7.2.22", "-cpu", False),  # built static: no plugins
    ],
)
def test_only_fitting_emulators(monkeypatch: pytest.MonkeyPatch, version: str, options: str, fits: bool) -> None:
    answers = {"--version": f"qemu-aarch64 version {version}\nCopyright", "--help": options}
    monkeypatch.setattr(build.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(build, "_output", lambda command: answers[command[1]])
    assert (build.missing() == "") == fits


def test_processes_that_race_share_one_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    together = threading.Barrier(2)

    def fake(temporary: Path, tools: build.Tools, runtime: str) -> None:
        together.wait(timeout=10)
        (temporary / "build").mkdir()
        (temporary / "build" / "runner").write_text(runtime)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "find_tools", lambda: TOOLS)
    monkeypatch.setattr(build, "_build", fake)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: build.prepare(), range(2))
    assert first == second
    assert first.runner.read_text()
    assert list((tmp_path / "hadaptive-q").iterdir()) == [first.folder]
    assert build.prepare() == first  # from the cache: a third build would wait at the barrier


def test_failed_build_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no such wheel\n")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "find_tools", lambda: TOOLS)
    monkeypatch.setattr(build.subprocess, "run", refuse)
    with pytest.raises(UserError, match="ERROR: no such wheel"):
        build.prepare()
    assert list((tmp_path / "hadaptive-q").iterdir()) == []


def test_a_wheel_without_the_runtime_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def download(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "executorch.whl", "w") as wheel:
            wheel.writestr("executorch/lib/libexecutorch_threadpool.so", b"")
            wheel.writestr("../escaped", b"")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(build.subprocess, "run", download)
    monkeypatch.setattr(build, "find_tools", lambda: TOOLS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"for ARM64: got a wheel without executorch/lib/libexecutorch\.so"):
        build.prepare()
    assert [path.name for path in tmp_path.rglob("*")] == ["cache", "hadaptive-q"]


def test_unwritable_cache_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(build, "find_tools", lambda: TOOLS)
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        build.prepare()


def test_every_core_has_a_root(emulator: build.Build) -> None:
    for core in CORES.values():
        root = emulator.root(core)
        assert (root / "proc/cpuinfo").read_text() == core.cpuinfo
        assert (root / "lib/ld-linux-aarch64.so.1").exists()
        assert (root / "sys/devices/system/cpu/possible").read_text() == "0\n"
