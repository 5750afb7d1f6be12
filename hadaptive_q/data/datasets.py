"""Image data by name: embedded sets, a folder of class folders, or the Hugging Face hub.

Every source ends as `ImageData`: two splits of uint8 images at one size, with the class names and the
statistics that normalise them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from hadaptive_q.errors import UserError, nearest
from hadaptive_q.models.config import Preprocess

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DEFAULT_IMAGE_SIZE = 224
HELD_OUT = 0.2
Item = tuple[Tensor, int]


class Split(Protocol):
    """One split: item `i` is `(image, label)`, the image uint8 `(3, S, S)`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item: ...

    def identity(self, index: int) -> bytes:
        """Return bytes that determine sample `index` on every machine, before any resampling."""
        ...


@dataclass(frozen=True)
class ImageData:
    """A data set ready to train on: its splits, how its images are prepared, whether mirroring is sound."""

    name: str
    preprocess: Preprocess
    train: Split
    val: Split
    mirror: bool

    @property
    def num_classes(self) -> int:
        return len(self.preprocess.classes)


class TensorSplit(Dataset[Item]):
    """A split held in memory: images uint8 `(N, 3, S, S)`, labels `(N,)`, identities one bytes object each."""

    def __init__(self, images: Tensor, labels: Sequence[int], identities: Sequence[bytes]) -> None:
        self.images, self.labels, self.identities = images, list(labels), list(identities)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Item:
        return self.images[index], self.labels[index]

    def identity(self, index: int) -> bytes:
        return self.identities[index]


def digest(split: Split, indices: Sequence[int]) -> str:
    """Return ``sha256:...`` over the identities of `indices`, in order."""
    state = hashlib.sha256()
    for index in indices:
        identity = split.identity(index)
        state.update(len(identity).to_bytes(8, "little") + identity)
    return f"sha256:{state.hexdigest()}"


def held_out(labels: Sequence[int], seed: int = 0) -> tuple[list[int], list[int]]:
    """Split indices into train and validation, the same share of every class, at least one on each side.

    The only sample of a class is a training sample.
    """
    generator = np.random.default_rng(seed)
    array = np.asarray(labels)
    train: list[int] = []
    val: list[int] = []
    for label in np.unique(array):
        members = generator.permutation(np.flatnonzero(array == label))
        count = min(max(1, round(HELD_OUT * len(members))), len(members) - 1)
        val += members[:count].tolist()
        train += members[count:].tolist()
    return sorted(train), sorted(val)


def open_data(name: str, image_size: int | None = None) -> ImageData:
    """Open `digits`, `glyphs`, a folder of class folders, or ``hf:NAME``.

    `image_size` replaces the source's own size (64 for embedded sets, 224 otherwise).
    Raises UserError where nothing of that name exists or its content is unusable.
    """
    # Imported here: each source brings a library that the others do not need.
    if name.startswith("hf:"):
        from hadaptive_q.data.hub import open_hub

        return open_hub(name.removeprefix("hf:"), image_size)
    embedded: dict[str, Callable[[int | None], ImageData]] = {"digits": _digits, "glyphs": _glyphs}
    if name in embedded:
        return embedded[name](image_size)
    if not Path(name).is_dir():
        hint = nearest(name, embedded)
        raise UserError("--data", repr(name), "digits, glyphs, hf:NAME, or an existing folder of class folders", hint)
    from hadaptive_q.data.folder import open_folder

    return open_folder(Path(name), image_size)


def _digits(image_size: int | None) -> ImageData:
    from hadaptive_q.data.digits import open_digits

    return open_digits(image_size)


def _glyphs(image_size: int | None) -> ImageData:
    from hadaptive_q.data.glyphs import open_glyphs

    return open_glyphs(image_size)
