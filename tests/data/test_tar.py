"""Tar shards are read in place: nothing is unpacked, nothing in them is run, and what is odd is one line."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hadaptive_q.data import tar
from hadaptive_q.data.datasets import ImageData
from hadaptive_q.data.kept import index_file
from hadaptive_q.data.sources import open_data
from hadaptive_q.errors import UserError


def png(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((20, 30, 3), shade, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def samples(first: int, count: int) -> dict[str, bytes]:
    """Members of `count` samples, one gray each, labels alternating."""
    pairs = [(f"{s:06}.png", png(s), f"{s:06}.cls", str(s % 2).encode()) for s in range(first, first + count)]
    return {name: content for a, b, c, d in pairs for name, content in ((a, b), (c, d))}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write(tmp_path / "set" / "train-00000-of-00002.tar", samples(0, 6))
    write(tmp_path / "set" / "train-00001-of-00002.tar", samples(6, 4))
    write(tmp_path / "set" / "val-00000-of-00001.tar", samples(100, 4))
    return tmp_path / "set"


def shades(data: ImageData) -> list[list[int]]:
    found = []
    for split in (data.train, data.val):
        items = [split[i] for i in range(len(split))]
        assert all(label == int(image[0, 0, 0]) % 2 for image, label in items)
        assert [split.identity(i) for i in range(len(split))] == [png(int(image[0, 0, 0])) for image, _ in items]
        found.append([int(image[0, 0, 0]) for image, _ in items])
    return found


def test_shards_go_to_their_splits(root: Path) -> None:
    data = open_data(str(root), 8)
    assert shades(data) == [list(range(10)), list(range(100, 104))]
    assert data.preprocess.classes == ("0", "1")


def test_without_validation_shards_a_fifth_is_held_out(root: Path) -> None:
    (root / "val-00000-of-00001.tar").unlink()
    train, val = shades(open_data(str(root), 8))
    assert (len(train), len(val)) == (8, 2)
    assert sorted(train + val) == list(range(10))


def test_the_index_is_kept_until_a_shard_changes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = shades(open_data(str(root), 8))
    assert index_file(root).is_file()
    with monkeypatch.context() as patch:
        patch.setattr(tar, "_index", None)
        assert shades(open_data(str(root), 8)) == first
    write(root / "val-00000-of-00001.tar", samples(50, 6))
    assert shades(open_data(str(root), 8))[1] == list(range(50, 56))
    index_file(root).write_bytes(b"damaged")
    assert shades(open_data(str(root), 8))[1] == list(range(50, 56))


def test_names_lead_nowhere_and_nothing_is_run(root: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "exploded",))  # type: ignore[return-value]

    hostile = {
        "../x.png": png(7),
        "../x.cls": b"1",
        "/etc/y.png": png(8),
        "/etc/y.cls": b"0\n",
        "000001.pickle": pickle.dumps(Bomb()),
        "000001.pth": pickle.dumps(Bomb()),
    }
    path = write(root / "train-00000-of-00002.tar", hostile)
    with tarfile.open(path, "a") as archive:
        for kind, target in ((tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "../../x"), (tarfile.FIFOTYPE, "")):
            member = tarfile.TarInfo(f"link{int(kind)}.png")
            member.type, member.linkname = kind, target
            archive.addfile(member)
    before = sorted(tmp_path.rglob("*"))
    data = open_data(str(root), 8)
    assert shades(data)[0] == [7, 8, *range(6, 10)]
    kept = [path for path in sorted(tmp_path.rglob("*")) if path not in before]
    assert {path.name for path in kept} <= {"cache", "hadaptive-q", index_file(root).name}
    assert not Path("../x.png").exists()


@pytest.mark.parametrize("kept", [700, 3000, -11_000])
def test_a_shard_cut_short_is_refused(kept: int, root: Path) -> None:
    path = root / "train-00001-of-00002.tar"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"train-00001-of-00002\.tar.*(copy it again|beside it)"):
        open_data(str(root), 8)


@pytest.mark.parametrize("content", [b"", b"not a tar at all" * 100], ids=["empty", "text"])
def test_what_is_no_tar_is_refused(content: bytes, root: Path) -> None:
    (root / "train-00001-of-00002.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"train-00001-of-00002\.tar: got .*; expected"):
        open_data(str(root), 8)


def test_a_compressed_shard_is_refused(root: Path) -> None:
    with tarfile.open(root / "train-00001-of-00002.tar", "w:gz") as archive:
        archive.add(__file__, "000001.png")
    with pytest.raises(UserError, match="expected a whole tar file, not compressed; copy it again"):
        open_data(str(root), 8)


def test_a_missing_shard_is_named(root: Path) -> None:
    (root / "train-00001-of-00002.tar").unlink()
    with pytest.raises(UserError, match=r"--data .*set: got no shard 1 of train; expected all 2"):
        open_data(str(root), 8)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": png(1)}, r"train-0\.tar, a: got an image without a class; expected a\.cls beside it"),
        (
            {"a.png": png(1), "a.cls": b"cat"},
            r"train-0\.tar, a\.cls: got 'cat'; expected the number of a class, from 0",
        ),
        ({"a.png": png(1), "a.cls": b"-1"}, "got '-1'; expected the number"),
        ({"a.png": png(1), "a.cls": b"1" * 50}, "got '11111111'; expected the number"),
        ({"a.cls": b"1", "readme.txt": b""}, r"train-0\.tar: got no images; expected members such as 000001\.jpg"),
    ],
)
def test_members_that_do_not_fit_are_named(members: dict[str, bytes], message: str, tmp_path: Path) -> None:
    write(tmp_path / "train-0.tar", members)
    with pytest.raises(UserError, match=message):
        open_data(str(tmp_path), 8)


def test_a_damaged_image_is_named_by_its_shard(tmp_path: Path) -> None:
    write(tmp_path / "train-0.tar", {**samples(0, 4), "000000.png": b"no image"})
    data = open_data(str(tmp_path), 8)
    with pytest.raises(UserError, match=r"train-0\.tar, byte 512: got '.*'; expected an image that Pillow can read"):
        [split[i] for split in (data.train, data.val) for i in range(len(split))]


def test_a_shard_that_went_away_is_named(root: Path) -> None:
    data = open_data(str(root), 8)
    (root / "train-00000-of-00002.tar").unlink()
    with pytest.raises(UserError, match=r"got 'No such file or directory'; expected the shard that was there"):
        data.train[0]


def test_validation_shards_alone_are_refused(root: Path) -> None:
    for path in root.glob("train-*"):
        path.unlink()
    with pytest.raises(UserError, match=r"got shards of val only; expected train-\*\.tar among them"):
        open_data(str(root), 8)
