"""Batches of a split, read by as many processes as it asks for; what comes does not depend on how many."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, default_collate

from hadaptive_q import processes
from hadaptive_q.data.crop import RandomCrop
from hadaptive_q.data.datasets import Item, Split
from hadaptive_q.data.stream import StreamSplit
from hadaptive_q.errors import UserError

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Draw:
    """What decides the random crops of an epoch: its seed, and the least share of an image's area that one has."""

    seed: int
    epoch: int
    least_area: float


def batches_of(split: Split, batch_size: int) -> Iterator[Batch]:
    """Yield `(images, labels)` over a split in order, the last batch shorter."""
    yield from _read(split, None, enumerate(range(len(split))), batch_size, drop_last=False)


def training_batches(split: Split, batch_size: int, draw: Draw) -> Iterator[Batch]:
    """Yield whole batches `(images, labels)` of an epoch, shuffled by torch's global generator and cropped by `draw`.

    Of each batch come the images of this process; the order is the same however many share it. A split smaller than one
    batch still gives one.
    """
    order = split.rows(draw.seed, draw.epoch) if isinstance(split, StreamSplit) else RandomSampler(split)
    yield from _read(split, draw, enumerate(order), min(batch_size, len(split)), drop_last=True)


def _read(
    split: Split, draw: Draw | None, order: Iterable[tuple[int, Any]], batch_size: int, drop_last: bool
) -> Iterator[Batch]:
    # The order, and of a stream the encoded images, come from this process: workers decode what they are told.
    batches = BatchSampler(order, batch_size, drop_last)  # type: ignore[arg-type]
    loader: DataLoader[Item] = DataLoader(
        _Rows(split, draw),
        batch_sampler=map(processes.own_rows, batches) if draw else batches,
        num_workers=split.workers,
        collate_fn=_collate,
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        images, labels = batch
        yield images, labels


@dataclass(frozen=True)
class _Rows(Dataset[Item]):
    """Samples by their place in the order of an epoch and their row; a mistake in the data is an answer, too.

    torch would raise it with the traceback of a worker for its message.
    """

    split: Split
    draw: Draw | None

    def __getitems__(self, rows: Sequence[tuple[int, Any]]) -> list[Item] | UserError:
        try:
            return [self.split.drawn(row, self._crop(place)) for place, row in rows]
        except UserError as error:
            return error

    def _crop(self, place: int) -> RandomCrop | None:
        if self.draw is None or self.draw.least_area == 1:
            return None
        generator = np.random.default_rng((self.draw.seed, self.draw.epoch, place))
        return RandomCrop(self.draw.least_area, generator)


def _collate(items: list[Item] | UserError) -> Any:
    return items if isinstance(items, UserError) else default_collate(items)
