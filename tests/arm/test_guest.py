"""How a guest ends: every failure is one line for the user."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from hadaptive_q.arm.build import Build
from hadaptive_q.arm.cores import CORES, Core
from hadaptive_q.arm.guest import MODEL, Guest
from hadaptive_q.errors import UserError


def guest(folder: Path, script: str, timeout: float = 10) -> Guest:
    """A guest whose emulator is a shell script."""
    emulator = folder / "emulator"
    emulator.write_text(f"#!/bin/sh\n{script}\n")
    emulator.chmod(0o755)
    return Guest(Build(folder, str(emulator)), CORES["cortex-a53"], Path("some.pte"), folder, timeout)


def test_lines_come_back_and_cores_are_not_dumped(tmp_path: Path) -> None:
    assert guest(tmp_path, "echo input Float 1 3; ulimit -c").run([]) == ["input Float 1 3", "0"]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("kill -ILL $$", "file some.pte on cortex-a53: got an illegal instruction.*lacks"),
        ("kill -SEGV $$", "got a crash .SIGSEGV."),
        ("sleep 30", "no end after 0.5 s"),
        (
            "echo 'E 00:00 executorch:x.cpp:1] no such kernel' >&2; echo 'runner: no' >&2; exit 1",
            "'no; no such kernel'",
        ),
        ("exit 3", "'exit code 3'"),
    ],
)
def test_failures_are_user_errors(tmp_path: Path, script: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        guest(tmp_path, script, timeout=0.5 if "sleep" in script else 10).run([])


def test_kernels_of_a_better_core_are_an_illegal_instruction(
    emulator: Build, int8_file: tuple[Path, Tensor, Tensor], tmp_path: Path
) -> None:
    """The part number promises dot products that the emulated core does not have."""
    (tmp_path / MODEL).symlink_to(int8_file[0])
    core = Core("cortex-a76", "cortex-a53", 0xD0B, "")
    with pytest.raises(UserError, match="CPU feature the core lacks"):
        Guest(emulator, core, int8_file[0], tmp_path, 60).count(["count", MODEL, "2"])
