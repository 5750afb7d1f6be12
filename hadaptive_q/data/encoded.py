"""A split whose images stay encoded until they are asked for, by one process or by several."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from hadaptive_q.data.crop import CentralCrop, RandomCrop
from hadaptive_q.data.datasets import DEFAULT_IMAGE_SIZE, IMAGENET_MEAN, IMAGENET_STD, ImageData, Item, Split
from hadaptive_q.data.image_file import decode
from hadaptive_q.models.config import Preprocess

# Starting a process costs as much as decoding this many photographs.
_WORTH_A_WORKER = 256
_MOST_WORKERS = 16


@dataclass(frozen=True)
class View:
    """How images are read: their size, `crop` as in `Preprocess`, and by how many processes, None for a good number."""

    size: int | None = None
    crop: float = 1.0
    workers: int | None = None

    @property
    def side(self) -> int:
        return self.size or DEFAULT_IMAGE_SIZE

    def item(self, encoded: bytes, place: str, crop: RandomCrop | None) -> Tensor:
        """Return what is seen of an image, uint8 `(3, side, side)`; `place` names it in a message."""
        return decode(encoded, self.side, place, crop or CentralCrop(self.crop))

    def readers(self, count: int) -> int:
        """Return by how many processes `count` images are read."""
        if self.workers is not None:
            return self.workers
        return min(os.cpu_count() or 1, _MOST_WORKERS, count // _WORTH_A_WORKER)

    def data(self, name: str, classes: Sequence[str], train: Split, val: Split) -> ImageData:
        """Return photographs as `ImageData`, with the statistics of ImageNet."""
        preprocess = Preprocess(
            image_size=self.side, mean=IMAGENET_MEAN, std=IMAGENET_STD, classes=tuple(classes), crop=self.crop
        )
        return ImageData(name, preprocess, train, val, mirror=True)


class EncodedSplit(Dataset[Item], ABC):
    """Images decoded when asked for, as `view` says; `labels` are known, `(N,)`."""

    def __init__(self, labels: np.ndarray, view: View) -> None:
        self.labels, self.view = labels, view

    @property
    def workers(self) -> int:
        return self.view.readers(len(self))

    @property
    def reach(self) -> int:
        return len(self)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Item:
        return self.drawn(index, None)

    def drawn(self, row: int, crop: RandomCrop | None) -> Item:
        return self.view.item(self.identity(row), self.place(row), crop), self.label(row)

    def label(self, index: int) -> int:
        return int(self.labels[index])

    @abstractmethod
    def identity(self, index: int) -> bytes:
        """Return the encoded image."""

    @abstractmethod
    def place(self, index: int) -> str:
        """Return what names sample `index` in a message."""
