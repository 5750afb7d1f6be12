"""What every source of images ends as: two splits of uint8 images at one size, class names and statistics."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

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


def labels_of(split: Split) -> Tensor:
    """Return the labels of `split` in order, `(N,)`."""
    return torch.tensor([split[index][1] for index in range(len(split))])


def spread(length: int, count: int) -> list[int]:
    """Return at most `count` indices spread evenly over ``range(length)``: splits are often sorted by class."""
    return [i * length // min(length, count) for i in range(min(length, count))]


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
