"""A folder of class folders: `ROOT/train/CLASS/*.png` and `ROOT/val/CLASS/*.png`, or `ROOT/CLASS/*.png` split by us."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hadaptive_q.data.class_tree import ClassTree, open_tree
from hadaptive_q.data.datasets import VAL_NAMES, ImageData, held_out
from hadaptive_q.data.encoded import EncodedSplit, View
from hadaptive_q.errors import UserError


class FolderSplit(EncodedSplit):
    """The images `rows` of `tree`."""

    def __init__(self, tree: ClassTree, rows: np.ndarray, view: View) -> None:
        super().__init__(tree.labels[rows], view)
        self.tree, self.rows = tree, rows

    def path(self, index: int) -> Path:
        return self.tree.path(int(self.rows[index]))

    def place(self, index: int) -> str:
        return str(self.path(index))

    def identity(self, index: int) -> bytes:
        path = self.path(index)
        try:
            return path.read_bytes()
        except OSError as error:
            raise UserError(str(path), f"'{error.strerror}'", "the image that was there at the start") from error


def open_folder(root: Path, view: View) -> ImageData:
    """Return the folder's data; classes are the sorted names of the class folders.

    Raises UserError for a class folder without images, an unreadable image, or other classes in `val/`.
    """
    val_root = next((root / name for name in VAL_NAMES if (root / name).is_dir()), None)
    if (root / "train").is_dir() and val_root is not None:
        train, val = open_tree(root / "train", 1), open_tree(val_root, 1)
        if val.classes != train.classes:
            odd = sorted(set(train.classes) ^ set(val.classes))
            raise UserError(
                str(val_root), f"other classes than train/ ({', '.join(odd[:3])})", "the same class folders"
            )
        splits = [FolderSplit(tree, np.arange(len(tree.labels)), view) for tree in (train, val)]
    else:
        train = open_tree(root / "train" if (root / "train").is_dir() else root, 2)  # one of them validates
        splits = [FolderSplit(train, np.array(rows), view) for rows in held_out(train.labels)]
    return view.data(str(root), train.classes, *splits)
