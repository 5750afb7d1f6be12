from __future__ import annotations

import stat
from pathlib import Path

import pytest

from hadaptive_q.atomic import output_folder, replacing, write_bytes, write_text, write_with
from hadaptive_q.errors import UserError


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


def test_output_folder_is_made_with_its_parents_and_may_exist(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    assert output_folder(folder) == folder
    assert folder.is_dir()
    (folder / "kept.txt").write_text("x")
    output_folder(folder)
    assert [p.name for p in folder.iterdir()] == ["kept.txt"]


@pytest.mark.parametrize("below", ["", "deeper"])
def test_output_folder_refuses_a_file_in_its_place(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"--out .*file.*choose another --out"):
        output_folder(tmp_path / "file" / below)
    assert (tmp_path / "file").read_text() == "x"
