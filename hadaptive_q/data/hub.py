"""``hf:NAME``: a data set of the Hugging Face hub, or a local parquet file or folder, through `datasets`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
from torch.utils.data import Dataset

from hadaptive_q.data.datasets import DEFAULT_IMAGE_SIZE, IMAGENET_MEAN, IMAGENET_STD, ImageData, Item, held_out
from hadaptive_q.data.image_file import decode
from hadaptive_q.errors import UserError
from hadaptive_q.models.config import Preprocess

_VAL_NAMES = ("validation", "val", "valid", "test")


class HubSplit(Dataset[Item]):
    """Rows of a table whose images stay encoded until asked for."""

    def __init__(self, table: Any, image: str, label: str, size: int, where: str) -> None:
        self.table = table.cast_column(image, datasets.Image(decode=False))
        self.image, self.label, self.size, self.where = image, label, size, where

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Item:
        return decode(self.identity(index), self.size, f"{self.where}, row {index}"), int(self.table[index][self.label])

    def identity(self, index: int) -> bytes:
        image = self.table[index][self.image]
        if image is None:
            raise UserError(f"{self.where}, row {index}", "no image", "an image in every row", "remove the row")
        return bytes(image["bytes"]) if image["bytes"] is not None else Path(image["path"]).read_bytes()


def open_hub(name: str, image_size: int | None = None) -> ImageData:
    """Return the data set `name`: a hub name, a `*.parquet` file, or a folder of them.

    It needs one Image column and one ClassLabel column; without a validation split, a fifth of train is held out.
    Raises UserError where it cannot be loaded or lacks such columns.
    """
    where = f"--data hf:{name}"
    tables = _load(name, where)
    train = tables["train"] if "train" in tables else next(iter(tables.values()))
    image = _column(train, datasets.Image, where)
    label = _column(train, datasets.ClassLabel, where)
    val_name = next((n for n in _VAL_NAMES if n in tables), None)
    labels = _labels(train, label, where)
    if val_name is not None:
        val = tables[val_name]
        _labels(val, label, where)
    else:
        kept, out = held_out(labels)
        train, val = train.select(kept), train.select(out)
    size = image_size or DEFAULT_IMAGE_SIZE
    classes = tuple(train.features[label].names)
    preprocess = Preprocess(image_size=size, mean=IMAGENET_MEAN, std=IMAGENET_STD, classes=classes)
    splits = [HubSplit(table, image, label, size, where) for table in (train, val)]
    return ImageData(f"hf:{name}", preprocess, splits[0], splits[1], mirror=True)


def _load(name: str, where: str) -> Any:
    path = Path(name)
    try:
        if path.suffix == ".parquet":
            if not path.is_file():
                raise UserError(where, "no such file", "a parquet file, a folder of them, or a hub name")
            return datasets.load_dataset("parquet", data_files={"train": str(path)})
        if path.is_dir():
            shards = sorted(path.glob("**/*.parquet"))
            if not shards:
                raise UserError(where, "a folder without *.parquet", "parquet shards")
            return datasets.load_dataset("parquet", data_files=_shards_by_split(shards))
        return datasets.load_dataset(name)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(where, f"'{first}'", "a hub data set that can be reached, or a local parquet") from error


def _shards_by_split(shards: list[Path]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for shard in shards:
        split = next((n for n in (*_VAL_NAMES, "train") if shard.name.startswith(n)), "train")
        found.setdefault(split, []).append(str(shard))
    return found


def _labels(table: Any, label: str, where: str) -> list[int]:
    labels = list(table[label])
    missing = sum(value is None or value < 0 for value in labels)
    if missing:
        raise UserError(f"{where}, column {label}", f"{missing} rows without a label", "labels for all rows")
    return labels


def _column(table: Any, kind: type, where: str) -> str:
    for name, feature in table.features.items():
        if isinstance(feature, kind):
            return str(name)
    columns = ", ".join(f"{n} ({type(f).__name__})" for n, f in table.features.items())
    raise UserError(where, f"columns {columns}", f"one of type {kind.__name__}")
