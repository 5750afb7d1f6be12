"""``hf:NAME``: a data set of the Hugging Face hub, or local parquet shards, through `datasets`.

As a table, memory-mapped, or with ``hf-stream:NAME`` as a stream of which nothing is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from pyarrow import parquet

from hadaptive_q.data.datasets import VAL_NAMES, ImageData, held_out
from hadaptive_q.data.encoded import EncodedSplit, View
from hadaptive_q.data.image_file import image_bytes
from hadaptive_q.data.shards import shards_by_split
from hadaptive_q.data.stream import StreamSplit
from hadaptive_q.errors import UserError, first_line, nearest

_ENCODED = datasets.Image(decode=False)


class HubSplit(EncodedSplit):
    """Rows of a table whose images stay encoded until asked for."""

    def __init__(self, table: Any, image: str, labels: np.ndarray, view: View, where: str) -> None:
        super().__init__(labels, view)
        self.table = table.select_columns([image]).cast_column(image, _ENCODED)
        self.image, self.where = image, where

    def place(self, index: int) -> str:
        return f"{self.where}, row {index}"

    def identity(self, index: int) -> bytes:
        return image_bytes(self.table[index][self.image], self.place(index))


def open_hub(name: str, view: View) -> ImageData:
    """Return the data set `name`: a hub name, a `*.parquet` file, or a folder of them.

    It needs one Image column and one ClassLabel column; of several of these, ``NAME#COLUMN`` says which. Without a
    validation split, a fifth of train is held out. Raises UserError where it cannot be loaded or lacks such columns.
    """
    where = f"--data hf:{name}"
    source, _, wanted = name.partition("#")
    with _told(where):
        files = _local_files(source, where)
        tables = datasets.load_dataset("parquet", data_files=files) if files else datasets.load_dataset(source)
    train = tables["train"] if "train" in tables else next(iter(tables.values()))
    image, label = _columns(train, wanted, where)
    labels = _labels(train, label, where)
    val_name = next((n for n in VAL_NAMES if n in tables), None)
    if val_name is not None:
        val = tables[val_name]
        val_labels = _labels(val, label, where)
    else:
        kept, out = held_out(labels)
        val, val_labels = train.select(out), labels[out]
        train, labels = train.select(kept), labels[kept]
    splits = [HubSplit(table, image, of, view, where) for table, of in ((train, labels), (val, val_labels))]
    return view.data(f"hf:{name}", train.features[label].names, *splits)


def open_stream(name: str, view: View) -> ImageData:
    """Return the data set `name` as `open_hub` does, but train as a stream; the validation split is a table.

    Raises UserError, beside that, where there is no validation split or nothing says how many rows train has.
    """
    where = f"--data hf-stream:{name}"
    source, _, wanted = name.partition("#")
    with _told(where):
        kind, features, files = "parquet", None, _local_files(source, where)
        if files:
            length = sum(parquet.read_metadata(path).num_rows for path in files.get("train", []))
        else:
            builder = datasets.load_dataset_builder(source)
            kind, features, files = builder.name, builder.info.features, dict(builder.config.data_files or {})
            length = _stated_rows(builder.info)
        val_name = next((n for n in VAL_NAMES if n in files), None)
        if "train" not in files or val_name is None:
            splits = ", ".join(files) or "no splits"
            raise UserError(where, splits, "train and validation: nothing is held out of a stream", "take it with hf:")
        if not length:
            raise UserError(where, "no number of rows", "a data set that says how many it has", "take it with hf:")
        chosen = {"train": list(files["train"]), "val": list(files[val_name])}
        val = datasets.load_dataset(kind, data_files={"val": chosen["val"]}, split="val", features=features)
        train = datasets.load_dataset(
            kind, data_files={"train": chosen["train"]}, split="train", features=features, streaming=True
        )
    image, label = _columns(val, wanted, where)
    for column in (image, label):
        if train.features is not None and train.features.get(column) != val.features[column]:
            raise UserError(f"{where}, column {column}", "another in train", "the same in train and validation")
    streamed = StreamSplit(train.cast_column(image, _ENCODED), image, label, length, view, where)
    kept = HubSplit(val, image, _labels(val, label, where), view, where)
    return view.data(f"hf-stream:{name}", val.features[label].names, streamed, kept)


def _stated_rows(info: Any) -> int:
    split = (info.splits or {}).get("train")
    return int(split.num_examples or 0) if split else 0


@contextmanager
def _told(where: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            where, f"'{first_line(error)}'", "a hub data set that can be reached, or a local parquet"
        ) from error


def _local_files(name: str, where: str) -> dict[str, list[str]]:
    """Return the parquet files of a local `name` by split, none of a hub name."""
    path = Path(name)
    if path.suffix == ".parquet":
        if not path.is_file():
            raise UserError(where, "no such file", "a parquet file, a folder of them, or a hub name")
        return {"train": [str(path)]}
    if not path.is_dir():
        return {}
    found = shards_by_split(path.glob("**/*.parquet"), where)
    if not found:
        raise UserError(where, "a folder without *.parquet", "parquet shards")
    return found


def _columns(table: Any, wanted: str, where: str) -> tuple[str, str]:
    """Return the columns of images and labels: `wanted` of several ClassLabel columns, CIFAR-100 has two."""
    images = [str(name) for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    labels = [str(name) for name, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)]
    for found, kind in ((images, "Image"), (labels, "ClassLabel")):
        if not found:
            columns = ", ".join(f"{n} ({type(f).__name__})" for n, f in table.features.items())
            raise UserError(where, f"columns {columns}", f"one of type {kind}")
    if wanted and wanted not in labels:
        raise UserError(where, f"#{wanted}", f"one of {', '.join(labels)}", nearest(wanted, labels))
    if not wanted and len(labels) > 1:
        source = where.removeprefix("--data ")
        raise UserError(where, f"label columns {', '.join(labels)}", "one of them by name", f"say {source}#{labels[0]}")
    return images[0], wanted or labels[0]


def _labels(table: Any, label: str, where: str) -> np.ndarray:
    """Return the labels alone, 8 bytes each: the images stay where they are."""
    if not isinstance(table.features.get(label), datasets.ClassLabel):
        raise UserError(where, f"no column {label} in a split", "the same columns in every split")
    column = table.select_columns([label]).with_format("arrow")[:].column(label)
    labels: np.ndarray = column.fill_null(-1).to_numpy()
    missing = int((labels < 0).sum())
    if missing:
        raise UserError(f"{where}, column {label}", f"{missing} rows without a label", "labels for all rows")
    return labels
