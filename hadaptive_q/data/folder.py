"""A folder of class folders: `ROOT/train/CLASS/*.png` and `ROOT/val/CLASS/*.png`, or `ROOT/CLASS/*.png` split by us."""

from __future__ import annotations

from pathlib import Path

from torch.utils.data import Dataset

from hadaptive_q.data.datasets import (
    DEFAULT_IMAGE_SIZE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageData,
    Item,
    held_out,
)
from hadaptive_q.data.image_file import check_header, decode
from hadaptive_q.errors import UserError
from hadaptive_q.models.config import Preprocess

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_VAL_NAMES = ("val", "valid", "validation", "test")
_LAYOUT = "class folders with images, or train/ and val/ with class folders"


class FolderSplit(Dataset[Item]):
    """Images decoded when asked for; `files` are `(path, label)`."""

    def __init__(self, files: list[tuple[Path, int]], size: int) -> None:
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Item:
        path, label = self.files[index]
        return decode(path.read_bytes(), self.size, str(path)), label

    def identity(self, index: int) -> bytes:
        return self.files[index][0].read_bytes()


def open_folder(root: Path, image_size: int | None = None) -> ImageData:
    """Return the folder's data; classes are the sorted names of the class folders.

    Raises UserError for a class folder without images, an unreadable image, or other classes in `val/`.
    """
    size = image_size or DEFAULT_IMAGE_SIZE
    val_root = next((root / name for name in _VAL_NAMES if (root / name).is_dir()), None)
    if (root / "train").is_dir() and val_root is not None:
        classes, train = _scan(root / "train", 1)
        val_classes, val = _scan(val_root, 1)
        if val_classes != classes:
            odd = sorted(set(classes) ^ set(val_classes))
            raise UserError(
                str(val_root), f"other classes than train/ ({', '.join(odd[:3])})", "the same class folders"
            )
    else:
        root_of_all = root / "train" if (root / "train").is_dir() else root
        classes, files = _scan(root_of_all, 2)  # one of them validates
        kept, out = held_out([label for _, label in files])
        train, val = [files[i] for i in kept], [files[i] for i in out]
    preprocess = Preprocess(image_size=size, mean=IMAGENET_MEAN, std=IMAGENET_STD, classes=classes)
    return ImageData(str(root), preprocess, FolderSplit(train, size), FolderSplit(val, size), mirror=True)


def _scan(root: Path, least: int) -> tuple[tuple[str, ...], list[tuple[Path, int]]]:
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(folders) < 2:
        raise UserError(f"--data {root}", f"{len(folders)} class folders", _LAYOUT)
    files: list[tuple[Path, int]] = []
    for label, folder in enumerate(folders):
        images = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if len(images) < least:
            raise UserError(
                f"--data {folder}",
                f"{len(images)} images",
                f"at least {least} in every class",
                "add some, or remove the folder",
            )
        for path in images:
            check_header(path)
        files += [(path, label) for path in images]
    return tuple(folder.name for folder in folders), files
