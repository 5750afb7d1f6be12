"""The index of class folders: compact, kept once it is worth it, and made anew when the folders changed."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hadaptive_q.data import class_tree
from hadaptive_q.data.class_tree import ClassTree, open_tree
from hadaptive_q.data.kept import index_file
from hadaptive_q.errors import UserError

LONG_AGO_NS = 10**18


def age(root: Path) -> None:
    """Make all folders look as if nothing had been done to them for years."""
    for folder in (root, *(path for path in root.rglob("*") if path.is_dir())):
        os.utime(folder, ns=(LONG_AGO_NS, LONG_AGO_NS))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes of three images, one of them in a folder of its own; an index of so few is kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(class_tree, "KEPT_FROM", 4)
    for name in ("cat/1.png", "cat/may/2.png", "cat/10.png", "dög/1.PNG", "dög/2.png", "dög/3.png"):
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(path)
    age(tmp_path / "root")
    return tmp_path / "root"


def names(tree: ClassTree) -> list[str]:
    return [str(tree.path(i).relative_to(tree.root)) for i in range(len(tree.labels))]


NAMES = ["cat/1.png", "cat/10.png", "cat/may/2.png", "dög/1.PNG", "dög/2.png", "dög/3.png"]


def test_the_tree_is_walked_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert names(open_tree(root, 1)) == NAMES
    assert index_file(root).is_file()

    def walked(_: object) -> None:
        raise AssertionError("walked again")

    monkeypatch.setattr(class_tree, "_Walk", walked)
    again = open_tree(root, 1)
    assert (again.classes, again.labels.tolist()) == (("cat", "dög"), [0, 0, 0, 1, 1, 1])
    assert names(again) == NAMES


@pytest.mark.parametrize("folder", ["cat", "cat/may", "new", "dög"])
def test_a_folder_that_changed_makes_it_anew(folder: str, root: Path) -> None:
    open_tree(root, 1)
    (root / folder).mkdir(exist_ok=True)
    Image.new("L", (4, 4)).save(root / folder / "9.png")
    assert f"{folder}/9.png" in names(open_tree(root, 1))


def test_a_lost_or_renamed_file_makes_it_anew(root: Path) -> None:
    open_tree(root, 1)
    (root / "cat" / "10.png").rename(root / "cat" / "11.png")
    assert "cat/11.png" in names(open_tree(root, 1))
    age(root)
    open_tree(root, 1)
    (root / "cat" / "may" / "2.png").unlink()
    (root / "cat" / "may").rmdir()
    assert names(open_tree(root, 1)) == ["cat/1.png", "cat/11.png", *NAMES[3:]]


def test_a_folder_changed_just_now_is_not_trusted(root: Path) -> None:
    os.utime(root / "cat")
    open_tree(root, 1)
    assert not index_file(root).exists()


def test_few_images_are_walked_every_time(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_tree, "KEPT_FROM", 7)
    open_tree(root, 1)
    assert not index_file(root).exists()


@pytest.mark.parametrize("damage", [b"", b"not an index", None])
def test_a_damaged_index_is_made_anew(damage: bytes | None, root: Path) -> None:
    open_tree(root, 1)
    whole = index_file(root).read_bytes()
    index_file(root).write_bytes(whole[:-5] if damage is None else damage)
    assert names(open_tree(root, 1)) == NAMES
    assert index_file(root).read_bytes() == whole


def test_a_cache_that_takes_nothing_does_not_stop_it(root: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("no folder")
    assert names(open_tree(root, 1)) == NAMES


def test_what_is_left_out_is_counted(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    for odd in ("._1.png", ".hidden/1.png", "Thumbs.db", "labels.csv"):
        path = root / "cat" / odd
        path.parent.mkdir(exist_ok=True)
        path.write_text("no image")
    with caplog.at_level(logging.INFO):
        assert names(open_tree(root, 1)) == NAMES
    assert "6 images in 2 classes, 4 other files left out" in caplog.text


def test_headers_are_read_once(root: Path) -> None:
    open_tree(root, 1)
    (root / "cat" / "1.png").write_bytes(b"overwritten in place")
    assert names(open_tree(root, 1)) == NAMES, "no folder changed: the image says so when it is read"
    index_file(root).unlink()
    with pytest.raises(UserError, match=r"1\.png: got '.*'; expected an image that Pillow can read"):
        open_tree(root, 1)


def test_names_that_are_no_text_are_kept_as_bytes(root: Path) -> None:
    if sys.platform == "darwin":
        pytest.skip("its file systems take Unicode alone")
    Image.new("L", (4, 4)).save(os.fsdecode(os.fsencode(root / "cat") + b"/\xff.png"))
    age(root)
    assert open_tree(root, 1).path(3).is_file()
    assert index_file(root).is_file()
    assert open_tree(root, 1).path(3).is_file()


def test_a_million_images_take_tens_of_bytes_each() -> None:
    count = 1_000_000
    name = b"n01440764_10026.JPEG"
    tree = ClassTree(
        Path("root"),
        ("n01440764",),
        np.zeros(count, np.int32),
        np.frombuffer(name * count, np.uint8),
        np.arange(1, count + 1, dtype=np.int64) * len(name),
    )
    assert sum(part.nbytes for part in (tree.labels, tree.names, tree.ends)) == 32 * count
    assert tree.path(count - 1) == Path("root/n01440764/n01440764_10026.JPEG")
