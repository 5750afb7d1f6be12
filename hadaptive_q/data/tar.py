"""A folder of tar shards in WebDataset's layout, `000001.jpg` beside `000001.cls`: read in place, never unpacked.

A member's name is a key and an ending, and never a path.
"""

from __future__ import annotations

import logging
import tarfile
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hadaptive_q.data.class_tree import SUFFIXES
from hadaptive_q.data.datasets import VAL_NAMES, ImageData, held_out
from hadaptive_q.data.encoded import EncodedSplit, View
from hadaptive_q.data.kept import index_file, keep, recall
from hadaptive_q.data.shards import shards_by_split
from hadaptive_q.errors import UserError

log = logging.getLogger(__name__)
Index = dict[str, np.ndarray]
_COLUMNS = {"shard": "i", "offset": "q", "size": "q", "label": "i"}
_MOST_DIGITS = 6


class TarSplit(EncodedSplit):
    """Images of `index`: where each lies in `shards`, by its number, its offset and its size in bytes."""

    def __init__(self, shards: list[str], index: Index, view: View) -> None:
        super().__init__(index["label"], view)
        self.shards, self.index = shards, index

    def place(self, index: int) -> str:
        return f"{self.shards[self.index['shard'][index]]}, byte {self.index['offset'][index]}"

    def identity(self, index: int) -> bytes:
        try:
            with open(self.shards[self.index["shard"][index]], "rb") as shard:
                shard.seek(int(self.index["offset"][index]))
                return shard.read(int(self.index["size"][index]))
        except OSError as error:
            raise UserError(
                self.place(index), f"'{error.strerror}'", "the shard that was there at the start"
            ) from error


def open_tars(root: Path, view: View) -> ImageData:
    """Return the images of all `*.tar` in `root`; classes are the numbers from 0 to the largest one.

    Where every member begins is found once, and kept as long as no shard's size or time changes.
    Raises UserError for a shard that is missing, compressed or cut short, and for an image without a class.
    """
    where = f"--data {root}"
    files = shards_by_split(root.glob("*.tar"), where)
    if "train" not in files:
        raise UserError(where, f"shards of {', '.join(files)} only", "train-*.tar among them")
    index = _kept_index(root, files)
    val_name = next((name for name in VAL_NAMES if name in files), None)
    train = index["train"]
    classes = [str(label) for label in range(int(max(part["label"].max() for part in index.values())) + 1)]
    if val_name is not None:
        val, val_files = index[val_name], files[val_name]
    else:
        kept, out = held_out(train["label"])
        val, val_files = ({name: column[out] for name, column in train.items()}, files["train"])
        train = {name: column[kept] for name, column in train.items()}
    return view.data(str(root), classes, TarSplit(files["train"], train, view), TarSplit(val_files, val, view))


def _kept_index(root: Path, files: dict[str, list[str]]) -> dict[str, Index]:
    stats = {shard: Path(shard).stat() for shards in files.values() for shard in shards}
    facts = {Path(shard).name: [stat.st_size, stat.st_mtime_ns] for shard, stat in stats.items()}
    path = index_file(root)
    found = recall(path)
    if found and found[1] == facts:
        return {split: {name: found[0][f"{split} {name}"] for name in _COLUMNS} for split in files}
    index = {split: _index(shards) for split, shards in files.items()}
    keep(path, {f"{split} {name}": column for split, part in index.items() for name, column in part.items()}, facts)
    return index


def _index(shards: list[str]) -> Index:
    columns: dict[str, array[Any]] = {name: array(kind) for name, kind in _COLUMNS.items()}
    others = 0
    for number, shard in enumerate(shards):
        images: dict[str, tuple[int, int]] = {}
        labels: dict[str, int] = {}
        for member, read in _members(shard):
            folder, _, base = member.name.rpartition("/")
            stem, _, ending = base.partition(".")
            key = f"{folder}/{stem}"
            if f".{ending.lower()}" in SUFFIXES:
                images[key] = member.offset_data, member.size
            elif ending == "cls":
                labels[key] = _label(read(), f"{shard}, {member.name}")
            else:
                others += 1
        for key, (offset, size) in images.items():
            if key not in labels:
                name = key.removeprefix("/")
                raise UserError(f"{shard}, {name}", "an image without a class", f"{name}.cls beside it")
            for name, value in zip(_COLUMNS, (number, offset, size, labels[key]), strict=True):
                columns[name].append(value)
        if not images:
            raise UserError(shard, "no images", "members such as 000001.jpg and 000001.cls")
    log.info("%d shards: %d images, %d other members left out", len(shards), len(columns["shard"]), others)
    return {name: np.frombuffer(column, f"i{column.itemsize}") for name, column in columns.items()}


def _members(shard: str) -> Iterator[tuple[tarfile.TarInfo, Callable[[], bytes]]]:
    """Yield the plain files of a shard, with what reads the beginning of one."""
    try:
        with tarfile.open(shard, "r:") as archive:
            whole = Path(shard).stat().st_size
            for member in iter(archive.next, None):
                archive.members = []  # type: ignore[attr-defined]  # it remembers every one, a kilobyte per image
                if member.offset_data + member.size > whole:
                    raise tarfile.ReadError("unexpected end of data")
                if member.isreg() and not member.issparse():
                    yield member, partial(_beginning, archive, member)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(shard, f"'{error}'", "a whole tar file, not compressed", "copy it again") from error


def _beginning(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    content = archive.extractfile(member)
    assert content is not None
    return content.read(_MOST_DIGITS + 2)


def _label(content: bytes, where: str) -> int:
    text = content.strip()
    if not text.isdigit() or len(text) > _MOST_DIGITS:
        raise UserError(where, repr(text.decode(errors="replace")), "the number of a class, from 0")
    return int(text)
