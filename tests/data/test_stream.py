"""Streams: every row once an epoch, in an order of seed and epoch, the same with any number of workers."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hadaptive_q.data import stream
from hadaptive_q.data.calibration import Manifest, batches, find_manifest, resolve
from hadaptive_q.data.datasets import digest
from hadaptive_q.data.loader import Draw, training_batches
from hadaptive_q.data.sources import open_data
from hadaptive_q.errors import UserError

SHARDS, ROWS = 3, 8


def png(shade: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((10, 12, 3), shade, np.uint8)).save(out, "PNG")
    return out.getvalue()


def write(path: Path, shades: range, label: str = "label", missing: int | None = None) -> None:
    rows = {
        "image": [{"bytes": png(s), "path": None} for s in shades],
        label: [None if s == missing else s % 2 for s in shades],
    }
    features = datasets.Features({"image": datasets.Image(), label: datasets.ClassLabel(names=["even", "odd"])})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of eight grays, and four more that validate."""
    root = tmp_path_factory.mktemp("shards")
    for number in range(SHARDS):
        write(root / f"train-{number:05}-of-{SHARDS:05}.parquet", range(number * ROWS, (number + 1) * ROWS))
    write(root / "validation-00000-of-00001.parquet", range(100, 104))
    return root


def epoch(folder: Path, seed: int, number: int, workers: int = 0) -> tuple[Tensor, Tensor]:
    data = open_data(f"hf-stream:{folder}", 8, workers=workers)
    batched = list(training_batches(data.train, 5, Draw(seed, number, 0.5)))
    return torch.cat([images for images, _ in batched]), torch.cat([labels for _, labels in batched])


def shades(images: Tensor) -> list[int]:
    return images[:, 0, 0, 0].tolist()


def test_an_epoch_has_every_row_once_in_whole_batches(folder: Path) -> None:
    data = open_data(f"hf-stream:{folder}", 8)
    assert (data.name, len(data.train), len(data.val)) == (f"hf-stream:{folder}", SHARDS * ROWS, 4)
    assert data.preprocess.classes == ("even", "odd")
    images, labels = epoch(folder, 0, 0)
    assert len(images) == 20
    assert labels.tolist() == [shade % 2 for shade in shades(images)]
    assert len(set(shades(images))) == 20
    assert isinstance(data.train, stream.StreamSplit)
    assert sorted(row.label for row in data.train.rows(0, 0)) == [0] * 12 + [1] * 12
    assert [int(data.val[i][0][0, 0, 0]) for i in range(4)] == [100, 101, 102, 103]


def test_seed_and_epoch_decide_the_order(folder: Path) -> None:
    orders = [shades(epoch(folder, seed, number)[0]) for seed, number in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2] != orders[3] != orders[0]
    assert orders[0] != sorted(orders[0])


def test_the_number_of_workers_changes_nothing(folder: Path) -> None:
    found = [epoch(folder, 3, 1, workers) for workers in (0, 1, 2)]
    for images, labels in found[1:]:
        assert torch.equal(images, found[0][0])
        assert torch.equal(labels, found[0][1])


def test_calibration_takes_the_head_of_one_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "HEAD", 6)
    data = open_data(f"hf-stream:{folder}", 8)
    manifest = resolve(find_manifest("auto", data), data)
    assert manifest.indices == tuple(range(6))
    (inputs,) = batches(manifest, data, 64)
    assert inputs.shape == (6, 3, 8, 8)
    again = open_data(f"hf-stream:{folder}", 16)
    assert resolve(manifest, again) == manifest
    assert digest(again.train, range(6)) == manifest.digest
    assert [again.train.label(i) for i in range(6)] == [again.train[i][1] for i in range(6)]
    with pytest.raises(UserError, match="got count 7; expected at most 6, what a stream keeps"):
        resolve(Manifest(source=data.name, count=7), data)
    with pytest.raises(UserError, match="got index 6; expected below 6, what a stream keeps"):
        resolve(Manifest(source=data.name, indices=(6,)), data)


def test_a_stream_needs_both_splits(tmp_path: Path) -> None:
    write(tmp_path / "train-0.parquet", range(4))
    with pytest.raises(UserError, match="got train; expected train and validation: nothing is held out of a stream"):
        open_data(f"hf-stream:{tmp_path}")
    (tmp_path / "train-0.parquet").rename(tmp_path / "val-0.parquet")
    with pytest.raises(UserError, match="got val; expected train and validation"):
        open_data(f"hf-stream:{tmp_path}")


def test_splits_with_other_columns_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "train-0.parquet", range(4), label="kind")
    write(tmp_path / "val-0.parquet", range(4))
    with pytest.raises(UserError, match="column label: got another in train; expected the same in train and valid"):
        open_data(f"hf-stream:{tmp_path}")


def test_what_is_no_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--data hf-stream:.*/x\.parquet: got no such file"):
        open_data(f"hf-stream:{tmp_path}/x.parquet")
    (tmp_path / "train-0.parquet").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"--data hf-stream:.*expected a hub data set that can be reached, or a local"):
        open_data(f"hf-stream:{tmp_path}")
    with pytest.raises(UserError, match=r"--data hf-stream:no-such/set: got '.*'; expected a hub data set that can be"):
        open_data("hf-stream:no-such/set")


def test_a_row_without_a_label_is_named_when_it_comes(tmp_path: Path) -> None:
    write(tmp_path / "train-0.parquet", range(4), missing=2)
    write(tmp_path / "val-0.parquet", range(4))
    with pytest.raises(UserError, match=r"row \d of epoch 7, column label: got no label; expected labels for all"):
        epoch(tmp_path, 0, 7)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_damaged_later_is_one_line(workers: int, tmp_path: Path) -> None:
    write(tmp_path / "train-0.parquet", range(20))
    write(tmp_path / "val-0.parquet", range(4))
    data = open_data(f"hf-stream:{tmp_path}", 8, workers=workers)
    content = bytearray((tmp_path / "train-0.parquet").read_bytes())
    content[4:-200] = bytes(len(content) - 204)
    (tmp_path / "train-0.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"--data hf-stream:.*: got '.+'; expected"):
        list(training_batches(data.train, 2, Draw(0, 0, 1.0)))
