"""A training split that is read from its beginning to its end, in an order shuffled by shards and a buffer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

from hadaptive_q.data.crop import RandomCrop
from hadaptive_q.data.datasets import Item
from hadaptive_q.data.encoded import View
from hadaptive_q.data.image_file import image_bytes
from hadaptive_q.errors import UserError, first_line

# Encoded images held at once: of photographs as in ImageNet, a hundred megabytes each.
BUFFER = 1000
HEAD = 1024


@dataclass(frozen=True)
class StreamRow:
    """One sample as it came: `place` names it in a message."""

    image: bytes
    label: int
    place: str


class StreamSplit:
    """`length` samples of `table`, an iterable table of `datasets`, decoded when asked for.

    By index, as calibration asks, only the first `HEAD` of one fixed order are there.
    """

    def __init__(self, table: Any, image: str, label: str, length: int, view: View, where: str) -> None:
        self.table, self.image, self.of_label = table, image, label
        self.length, self.view, self.where = length, view, where

    @property
    def workers(self) -> int:
        return self.view.readers(self.length)

    @property
    def reach(self) -> int:
        return min(HEAD, self.length)

    def __len__(self) -> int:
        return self.length

    def rows(self, seed: int, epoch: int) -> Iterator[StreamRow]:
        """Yield every sample once, in an order that `seed` and `epoch` decide."""
        shuffled = self.table.shuffle(seed=seed * 100_003 + epoch, buffer_size=BUFFER)
        for number, row in enumerate(islice(self._told(shuffled), self.length)):
            place = f"{self.where}, row {number} of epoch {epoch}"
            label = row[self.of_label]
            if label is None or label < 0:
                raise UserError(f"{place}, column {self.of_label}", "no label", "labels for all rows")
            yield StreamRow(image_bytes(row[self.image], place), int(label), place)

    def _told(self, rows: Iterable[Any]) -> Iterator[Any]:
        try:
            yield from rows
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(self.where, f"'{first_line(error)}'", "shards that can be read to their end") from error

    def drawn(self, row: int | StreamRow, crop: RandomCrop | None) -> Item:
        sample = self.head[row] if isinstance(row, int) else row
        return self.view.item(sample.image, sample.place, crop), sample.label

    def __getitem__(self, index: int) -> Item:
        return self.drawn(index, None)

    def label(self, index: int) -> int:
        return self.head[index].label

    def identity(self, index: int) -> bytes:
        return self.head[index].image

    @cached_property
    def head(self) -> list[StreamRow]:
        return list(islice(self.rows(0, 0), self.reach))
