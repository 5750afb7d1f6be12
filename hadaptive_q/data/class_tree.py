"""Class folders as a table of a few dozen bytes per image: walked once, and kept until a folder in them changes."""

from __future__ import annotations

import logging
import os
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hadaptive_q.data.image_file import check_header
from hadaptive_q.data.kept import Arrays, index_file, keep, recall
from hadaptive_q.errors import UserError

log = logging.getLogger(__name__)
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# Below that, a walk at every start is quick, and finds a damaged file before any training.
KEPT_FROM = 10_000
# A folder changed within the grain of its clock may change again without a new time.
CLOCK_GRAIN_NS = 2_000_000_000
_ARRAYS = ("labels", "names", "ends")
_LAYOUT = "class folders with images, or train/ and val/ with class folders"


@dataclass(frozen=True)
class ClassTree:
    """Every image under `root`: image `i` is of class `labels[i]`, and ``names[ends[i - 1]:ends[i]]`` in its folder.

    `names` are the bytes of all paths one after the other, without their class.
    """

    root: Path
    classes: tuple[str, ...]
    labels: np.ndarray
    names: np.ndarray
    ends: np.ndarray

    def path(self, index: int) -> Path:
        start = self.ends[index - 1] if index else 0
        name: bytes = self.names[start : self.ends[index]].tobytes()
        return self.root / self.classes[int(self.labels[index])] / os.fsdecode(name)


def open_tree(root: Path, least: int) -> ClassTree:
    """Return the images in the class folders of `root`, in the order of their paths.

    An index of many images is kept; it holds as long as no folder in `root` has got, lost or renamed an entry, by the
    folders' modification times. Raises UserError for fewer than two classes, fewer than `least` images in one, and a
    file that does not start like an image.
    """
    path = index_file(root)
    found = recall(path)
    if found:
        tree = _recalled(root, *found)
        if tree:
            return tree
    walk = _Walk(root)
    tree = walk.tree(least)
    log.info(
        "%s: %d images in %d classes, %d other files left out", root, len(tree.labels), len(tree.classes), walk.others
    )
    if len(tree.labels) >= KEPT_FROM and time.time_ns() - max(walk.folders.values()) > CLOCK_GRAIN_NS:
        arrays = {name: getattr(tree, name) for name in _ARRAYS}
        keep(path, arrays, {"classes": tree.classes, "folders": walk.folders})
    return tree


def _recalled(root: Path, arrays: Arrays, facts: dict[str, Any]) -> ClassTree | None:
    """Return the tree that was kept, None where a folder changed since or it was kept in another form."""
    try:
        if any((root / folder).stat().st_mtime_ns != changed for folder, changed in facts["folders"].items()):
            return None
        return ClassTree(root, tuple(facts["classes"]), *(arrays[name] for name in _ARRAYS))
    except (OSError, KeyError):
        return None


class _Walk:
    """One pass over `root`: the times of its folders, and how many files were left out."""

    def __init__(self, root: Path) -> None:
        self.root, self.folders, self.others = root, dict[str, int](), 0

    def tree(self, least: int) -> ClassTree:
        classes = sorted(entry.name for entry in self._entries("") if entry.is_dir() and entry.name[0] != ".")
        if len(classes) < 2:
            raise UserError(f"--data {self.root}", f"{len(classes)} class folders", _LAYOUT)
        labels, names, ends = array("i"), bytearray(), array("q")
        for label, name in enumerate(classes):
            files = sorted(self._images(name), key=lambda file: file.split(os.sep))
            if len(files) < least:
                raise UserError(
                    f"--data {self.root / name}",
                    f"{len(files)} images",
                    f"at least {least} in every class",
                    "add some, or remove the folder",
                )
            for file in files:
                check_header(self.root / file)
                labels.append(label)
                names += os.fsencode(file)[len(os.fsencode(name)) + 1 :]
                ends.append(len(names))
        arrays = (np.frombuffer(part, kind) for part, kind in ((labels, "i4"), (names, "u1"), (ends, "i8")))
        return ClassTree(self.root, tuple(classes), *arrays)

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        try:
            self.folders[folder] = (self.root / folder).stat().st_mtime_ns
            with os.scandir(self.root / folder) as entries:
                return list(entries)
        except OSError as error:
            raise UserError(
                f"--data {self.root / folder}", f"'{error.strerror}'", "a folder that can be read"
            ) from error

    def _images(self, folder: str) -> Iterator[str]:
        for entry in self._entries(folder):
            path = f"{folder}{os.sep}{entry.name}"
            if entry.name[0] != "." and entry.is_dir(follow_symlinks=False):
                yield from self._images(path)
            elif entry.name[0] != "." and entry.name.lower().endswith(SUFFIXES) and _is_file(entry):
                yield path
            else:
                self.others += 1


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link to itself
        return False
