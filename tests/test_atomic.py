from __future__ import annotations

import fcntl
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hadaptive_q.atomic import LOCK, PART, output_folder, replacing, write_bytes, write_text, write_with
from hadaptive_q.errors import UserError
from hadaptive_q.models.checkpoint import save_model
from hadaptive_q.models.families import create_model
from hadaptive_q.train.resume import save_state


def test_a_write_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    write_text(target, "alt: é\n")
    assert target.read_bytes() == b"alt: \xc3\xa9\n"  # UTF-8 whatever the locale, newline as written
    write_bytes(target, b"new")
    assert target.read_bytes() == b"new"
    write_with(target, lambda path: path.write_text("newer"))
    assert target.read_text() == "newer"
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_others_may_read_the_file(tmp_path: Path) -> None:
    target = tmp_path / "model.pte"
    write_bytes(target, b"x")  # temporary files start private to their owner
    assert stat.S_IMODE(target.stat().st_mode) == 0o644


def test_a_failed_write_keeps_the_old_file_and_cleans_up(tmp_path: Path) -> None:
    target = tmp_path / "model.pte"
    target.write_text("old")

    def fail_half_way(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_with(target, fail_half_way)
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["model.pte"]


def test_an_interrupted_write_shows_no_file(tmp_path: Path) -> None:
    def stop_half_way() -> None:
        with replacing(tmp_path / "new.bin") as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_half_way()
    assert list(tmp_path.iterdir()) == []


def test_the_temporary_file_lies_beside_its_target(tmp_path: Path) -> None:
    # Elsewhere the rename could cross file systems and would not be one step.
    with replacing(tmp_path / "a.bin") as temporary:
        assert temporary.parent == tmp_path
        assert temporary.name.startswith(".a.bin.")


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 64 kB."""
    folder = tmp_path / "full"
    folder.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("only root may mount a small file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


WRITERS: list[Callable[[Path], object]] = [
    lambda path: write_bytes(path, bytes(10**6)),
    lambda path: write_text(path, "x" * 10**6),
    lambda path: save_state(path, "key", {"w": torch.zeros(10**6)}),
    lambda path: save_model(create_model("hadaptive_net_nano"), path),
]


@pytest.mark.parametrize("write", WRITERS, ids=("bytes", "text", "state", "model"))
def test_a_full_disk_is_one_line_and_keeps_the_old_file(full_disk: Path, write: Callable[[Path], object]) -> None:
    target = full_disk / "model.safetensors"
    target.write_text("old")
    with pytest.raises(
        UserError, match=r"model\.safetensors: got '.*No space left on device.*'; .*; make room and run"
    ):
        write(target)
    assert target.read_text() == "old"
    assert [p.name for p in full_disk.iterdir()] == ["model.safetensors"]


def test_a_folder_on_a_full_disk_is_refused_at_once(full_disk: Path) -> None:
    (full_disk / "all").write_bytes(bytes(64 * 1024))
    with pytest.raises(UserError, match="No space left on device"), output_folder(full_disk / "new" / "run"):
        pytest.fail("there was room")


def test_a_disk_that_fills_up_under_a_limit(tmp_path: Path) -> None:
    """The same without root: files above 64 kB are refused by the system."""
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from hadaptive_q.atomic import write_bytes\n"
        "from hadaptive_q.errors import UserError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "try:\n    write_bytes(Path(sys.argv[1]), bytes(10**6))\n"
        "except UserError as error:\n    print(error)\n"
    )
    (tmp_path / "model.pte").write_text("old")
    command = [sys.executable, "-c", code, str(tmp_path / "model.pte")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "model.pte: got 'File too large'; expected a disk that takes the file" in done.stdout
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_an_output_folder_is_made_with_its_parents_and_may_exist(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    with output_folder(folder) as made:
        assert made == folder
        (folder / "kept.txt").write_text("x")
    with output_folder(folder):
        pass
    assert [p.name for p in folder.iterdir()] == ["kept.txt"]


@pytest.mark.parametrize("below", ["", "deeper"])
def test_an_output_folder_refuses_a_file_in_its_place(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(UserError, match=r"--out .*file.*choose another --out"),
        output_folder(tmp_path / "file" / below),
    ):
        pytest.fail("a file is no folder")
    assert (tmp_path / "file").read_text() == "x"


def test_a_read_only_folder_is_refused_at_once(tmp_path: Path) -> None:
    """By a process without the rights of root, whom permissions do not stop."""
    tmp_path.chmod(0o555)
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from hadaptive_q.atomic import output_folder\n"
        "from hadaptive_q.errors import UserError\n"
        "if os.getuid() == 0:\n    os.setuid(65534)\n"
        "try:\n    output_folder(Path('.')).__enter__()\n"
        "except UserError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (
        done.stdout == "--out .: got 'Permission denied'; expected a folder that can be written; choose another --out\n"
    )
    assert list(tmp_path.iterdir()) == []


HOLD = "from pathlib import Path\nfrom hadaptive_q.atomic import output_folder\nimport sys, time\n"


def holder(folder: Path, then: str) -> subprocess.Popen[str]:
    """Start a process that writes into `folder`, and return once it does."""
    code = f"{HOLD}with output_folder(Path(sys.argv[1])):\n    print('in', flush=True)\n    {then}\n"
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    return process


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    process = holder(tmp_path, "time.sleep(600)")
    wanted = rf"^--out {tmp_path}: got a folder that process {process.pid} is writing into; expected one run at a time"
    with pytest.raises(UserError, match=wanted), output_folder(tmp_path):
        pytest.fail("two at once")
    process.kill()
    process.wait()
    # Killed, it leaves the file of its lock and what it was writing, but no lock.
    (tmp_path / f".model.pte.x{PART}").write_text("half")
    assert (tmp_path / LOCK).is_file()
    with output_folder(tmp_path):
        assert (tmp_path / LOCK).read_text() == str(os.getpid())
    assert list(tmp_path.iterdir()) == []


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening and locking, its last holder may have removed the file."""
    taken: list[int] = []
    flock = fcntl.flock

    def late(handle: int, how: int) -> None:
        if not taken:
            (tmp_path / LOCK).unlink()
        taken.append(handle)
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with output_folder(tmp_path):
        assert len(taken) == 2
        with pytest.raises(UserError, match="one run at a time"), output_folder(tmp_path):
            pytest.fail("held twice")


def test_only_what_writers_left_is_removed(tmp_path: Path) -> None:
    kept = {".hidden", "model.part", "model.pte"}
    for name in (*kept, f".model.pte.abc{PART}"):
        (tmp_path / name).write_text("x")
    with output_folder(tmp_path):
        pass
    assert {p.name for p in tmp_path.iterdir()} == kept
