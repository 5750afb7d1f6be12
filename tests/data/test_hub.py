"""Parquet files as the Hugging Face hub serves them, written here by `datasets` itself; nothing asks the network."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from hadaptive_q.data.datasets import digest
from hadaptive_q.data.sources import open_data
from hadaptive_q.errors import UserError

NAMES = ["cat", "dog"]


def png(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((20, 30, 3), shade, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write(path: Path, columns: dict[str, Any], features: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(path)
    return path


def write_images(path: Path, count: int = 10, first: int = 0, **more: Any) -> Path:
    """Write `count` rows of one gray each, labels alternating."""
    shades = range(first, first + count)
    images = [{"bytes": png(s), "path": None} for s in shades]
    columns = {"id": list(shades), "picture": images, "kind": [s % 2 for s in shades], **more}
    label = datasets.ClassLabel(names=NAMES)
    return write(path, columns, {"id": datasets.Value("int64"), "picture": datasets.Image(), "kind": label})


def test_a_parquet_file_is_split_by_us(tmp_path: Path) -> None:
    path = write_images(tmp_path / "my pets.parquet")
    data = open_data(f"hf:{path}", 16)
    assert (len(data.train), len(data.val)) == (8, 2)
    assert data.preprocess.classes == ("cat", "dog")
    assert (data.name, data.mirror) == (f"hf:{path}", True)
    seen = []
    for split in (data.train, data.val):
        for index in range(len(split)):
            image, label = split[index]
            assert (image.dtype, tuple(image.shape)) == (torch.uint8, (3, 16, 16))
            shade = int(image[0, 0, 0])
            assert label == shade % 2
            assert split.identity(index) == png(shade)
            seen.append(shade)
    assert sorted(seen) == list(range(10))


def test_without_a_size_images_are_224(tmp_path: Path) -> None:
    data = open_data(f"hf:{write_images(tmp_path / 'x.parquet')}")
    assert data.val[0][0].shape == (3, 224, 224)


@pytest.mark.parametrize("val", ["validation", "val", "test"])
def test_shards_of_a_folder_go_to_their_splits(val: str, tmp_path: Path) -> None:
    write_images(tmp_path / "data" / "train-00000-of-00002.parquet", 4, first=0)
    write_images(tmp_path / "data" / "train-00001-of-00002.parquet", 4, first=4)
    write_images(tmp_path / "data" / f"{val}-00000-of-00001.parquet", 6, first=100)
    data = open_data(f"hf:{tmp_path}", 8)
    shades = [[int(split[i][0][0, 0, 0]) for i in range(len(split))] for split in (data.train, data.val)]
    assert shades == [list(range(8)), list(range(100, 106))]


def test_a_validation_split_goes_before_a_test_split(tmp_path: Path) -> None:
    for name, first in (("train", 0), ("test", 50), ("validation", 100)):
        write_images(tmp_path / f"{name}-0.parquet", 4, first)
    assert int(open_data(f"hf:{tmp_path}", 8).val[0][0][0, 0, 0]) == 100


def test_a_sample_is_known_by_its_encoded_bytes(tmp_path: Path) -> None:
    one = open_data(f"hf:{write_images(tmp_path / 'one.parquet')}", 8)
    two = open_data(f"hf:{write_images(tmp_path / 'two.parquet')}", 16)
    assert digest(one.train, range(8)) == digest(two.train, range(8))
    other = open_data(f"hf:{write_images(tmp_path / 'other.parquet', first=1)}", 8)
    assert digest(other.train, range(8)) != digest(one.train, range(8))


LABEL, IMAGE, TEXT = datasets.ClassLabel(names=NAMES), datasets.Image(), datasets.Value("string")


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"image": IMAGE, "label": datasets.Value("int64")}, "got columns image (Image), label (Value); expected one"),
        ({"image": IMAGE, "label": datasets.Value("int64")}, "of type ClassLabel"),
        ({"image": TEXT, "label": LABEL}, "got columns image (Value), label (ClassLabel); expected one of type Image"),
    ],
)
def test_missing_columns_are_named_with_those_there(features: dict[str, Any], message: str, tmp_path: Path) -> None:
    images = ["text" if features["image"] is TEXT else {"bytes": png(s), "path": None} for s in range(4)]
    path = write(tmp_path / "x.parquet", {"image": images, "label": [0, 1, 0, 1]}, features)
    with pytest.raises(UserError) as caught:
        open_data(f"hf:{path}")
    assert f"--data hf:{path}: " in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("label", [None, -1])
def test_rows_without_a_label_are_refused_before_training(label: int | None, tmp_path: Path) -> None:
    path = write_images(tmp_path / "x.parquet", kind=[0, 1] * 4 + [0, label])
    with pytest.raises(UserError, match=r"hf:.*, column kind: got 1 rows without a label; expected labels for all"):
        open_data(f"hf:{path}")


def test_a_validation_split_with_other_columns_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "train-0.parquet")
    columns = {"picture": [{"bytes": png(1), "path": None}], "text": ["a"]}
    write(tmp_path / "test-0.parquet", columns, {"picture": IMAGE, "text": TEXT})
    with pytest.raises(UserError, match="--data hf:"):
        open_data(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    "content", [{"bytes": b"not an image", "path": None}, {"bytes": png(3)[:50], "path": None}, None]
)
def test_an_image_that_cannot_be_decoded_is_named_by_its_row(content: object, tmp_path: Path) -> None:
    images = [{"bytes": png(s), "path": None} for s in range(10)]
    path = write_images(tmp_path / "x.parquet", picture=[*images[:9], content])
    data = open_data(f"hf:{path}", 8)
    messages = []
    for split in (data.train, data.val):
        for index in range(len(split)):
            try:
                split[index]
            except UserError as error:
                messages.append(str(error))
    assert len(messages) == 1
    assert messages[0].startswith(f"--data hf:{path}, row ")
    assert "expected an image" in messages[0]


def test_images_kept_as_files_are_read_from_there(tmp_path: Path) -> None:
    files = []
    for shade in range(10):
        files.append(tmp_path / f"{shade}.png")
        files[-1].write_bytes(png(shade))
    path = tmp_path / "x.parquet"
    features = datasets.Features({"picture": IMAGE, "kind": LABEL})
    table = datasets.Dataset.from_dict(
        {"picture": [{"bytes": None, "path": str(f)} for f in files], "kind": [0, 1] * 5}, features=features
    )
    # `datasets` embeds files when it writes parquet; other writers need not.
    pyarrow.parquet.write_table(table.data.table, path)
    data = open_data(f"hf:{path}", 8)
    assert {int(data.train[i][0][0, 0, 0]) for i in range(8)} < set(range(10))


def test_a_damaged_parquet_is_refused(tmp_path: Path) -> None:
    path = write_images(tmp_path / "x.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"--data hf:.*expected a hub data set that can be reached, or a local parquet"):
        open_data(f"hf:{path}")


def test_a_folder_without_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"got a folder without \*\.parquet; expected parquet shards"):
        open_data(f"hf:{tmp_path}")


def write_two_labels(folder: Path) -> str:
    """CIFAR-100's columns: a fine and a coarse label."""
    fine, coarse = datasets.ClassLabel(names=["apple", "bear", "crab"]), datasets.ClassLabel(names=["fruit", "animal"])
    for split, count in (("train", 9), ("test", 3)):
        columns = {
            "img": [{"bytes": png(s), "path": None} for s in range(count)],
            "fine_label": [s % 3 for s in range(count)],
            "coarse_label": [int(s % 3 > 0) for s in range(count)],
        }
        features = {"img": IMAGE, "fine_label": fine, "coarse_label": coarse}
        write(folder / f"{split}-00000-of-00001.parquet", columns, features)
    return str(folder)


@pytest.mark.parametrize("source", ["hf", "hf-stream"])
def test_of_two_label_columns_one_is_said(source: str, tmp_path: Path) -> None:
    name = f"{source}:{write_two_labels(tmp_path)}"
    with pytest.raises(UserError) as caught:
        open_data(name, 8)
    said = "got label columns fine_label, coarse_label; expected one of them by name"
    assert str(caught.value) == f"--data {name}: {said}; say {name}#fine_label"
    for column, classes in (("fine_label", ("apple", "bear", "crab")), ("coarse_label", ("fruit", "animal"))):
        data = open_data(f"{name}#{column}", 8)
        assert data.preprocess.classes == classes
        assert data.name == f"{name}#{column}"
        wanted = [s % 3 if column == "fine_label" else int(s % 3 > 0) for s in range(3)]
        assert [data.val.label(i) for i in range(3)] == [data.val[i][1] for i in range(3)] == wanted
    with pytest.raises(
        UserError, match="got #fine_labels; expected one of fine_label, coarse_label; did you mean 'fine"
    ):
        open_data(f"{name}#fine_labels")


@pytest.mark.parametrize("source", ["hf", "hf-stream"])
def test_a_missing_shard_is_named(source: str, tmp_path: Path) -> None:
    for number in (0, 3):
        write_images(tmp_path / f"train-{number:05}-of-00004.parquet", 4)
    with pytest.raises(UserError, match="got no shard 1, 2 of train; expected all 4, counted from 0; copy the others"):
        open_data(f"{source}:{tmp_path}")


def test_a_file_that_a_row_names_and_nobody_has_is_named(tmp_path: Path) -> None:
    features = datasets.Features({"picture": IMAGE, "kind": LABEL})
    rows = {"picture": [{"bytes": None, "path": str(tmp_path / f"{s}.png")} for s in range(4)], "kind": [0, 1] * 2}
    pyarrow.parquet.write_table(datasets.Dataset.from_dict(rows, features=features).data.table, tmp_path / "x.parquet")
    data = open_data(f"hf:{tmp_path / 'x.parquet'}", 8)
    with pytest.raises(UserError, match=r"row 0: got '.*No such file.*'; expected the file that the row names"):
        data.train[0]
