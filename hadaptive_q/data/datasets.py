"""What every source of images ends as: two splits of uint8 images at one size, class names and statistics."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from hadaptive_q.data.crop import RandomCrop
from hadaptive_q.models.config import Preprocess

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DEFAULT_IMAGE_SIZE = 224
HELD_OUT = 0.2
# What a validation split may be called: the first of these that is there.
VAL_NAMES = ("validation", "val", "valid", "test")
Item = tuple[Tensor, int]


class Split(Protocol):
    """One split: item `i` is `(image, label)`, the image uint8 `(3, S, S)`."""

    @property
    def workers(self) -> int:
        """How many processes read it while a network learns or answers."""
        ...

    @property
    def reach(self) -> int:
        """How many samples, from the first on, can be asked for by index."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item: ...

    def label(self, index: int) -> int: ...

    def drawn(self, row: Any, crop: RandomCrop | None) -> Item:
        """Return what `crop` takes of a sample, the sample itself without: `row` is an index, or what a stream gave."""
        ...

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
        self.workers = 0

    @property
    def reach(self) -> int:
        return len(self)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Item:
        return self.images[index], self.labels[index]

    def label(self, index: int) -> int:
        return self.labels[index]

    def drawn(self, row: int, crop: RandomCrop | None) -> Item:
        if crop is None:
            return self[row]
        image = self.images[row]
        left, top, right, bottom = map(round, crop.box(image.shape[2], image.shape[1]))
        part = image[None, :, top : max(bottom, top + 1), left : max(right, left + 1)].float()
        resized = F.interpolate(part, size=image.shape[1:], mode="bilinear", antialias=True)[0]
        return resized.round().clamp(0, 255).to(torch.uint8), self.labels[row]

    def identity(self, index: int) -> bytes:
        return self.identities[index]


def labels_of(split: Split) -> Tensor:
    """Return the labels of `split` in order, `(N,)`."""
    return torch.tensor([split.label(index) for index in range(len(split))])


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


def held_out(labels: Sequence[int] | np.ndarray, seed: int = 0) -> tuple[list[int], list[int]]:
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
