from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hadaptive_q.data.datasets import digest
from hadaptive_q.data.folder import FolderSplit
from hadaptive_q.data.sources import open_data
from hadaptive_q.errors import UserError


def fill(folder: Path, count: int, shade: int = 0, ending: str = ".png") -> Path:
    """Write `count` different images of 20 x 30 pixels into `folder`."""
    folder.mkdir(parents=True)
    for index in range(count):
        pixels = np.full((30, 20, 3), shade, np.uint8)
        pixels[0, index] = 255
        Image.fromarray(pixels).save(folder / f"image {index}{ending}")
    return folder


def test_class_folders_are_split_by_us(tmp_path: Path) -> None:
    fill(tmp_path / "Äpfel & Birnen", 10, 40)
    fill(tmp_path / "猫", 5, 120, ".JPG")
    fill(tmp_path / "a b", 5, 200, ".webp")
    data = open_data(str(tmp_path), 16)

    assert data.preprocess.classes == ("a b", "Äpfel & Birnen", "猫")
    assert (len(data.train), len(data.val)) == (16, 4)
    assert data.name == str(tmp_path)
    assert data.mirror is True
    shades = [200, 40, 120]
    for split in (data.train, data.val):
        for index in range(len(split)):
            image, label = split[index]
            assert (image.dtype, tuple(image.shape)) == (torch.uint8, (3, 16, 16))
            assert abs(int(image[0, 8, 8]) - shades[label]) <= 4  # JPEG and WebP are lossy
    assert {split[i][1] for split in (data.val,) for i in range(4)} == {0, 1, 2}


def test_without_a_size_images_are_224_as_in_imagenet(tmp_path: Path) -> None:
    for name in ("a", "b"):
        fill(tmp_path / name, 2)
    data = open_data(str(tmp_path))
    assert data.train[0][0].shape == (3, 224, 224)
    assert data.preprocess.image_size == 224
    assert data.preprocess.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_given_splits_are_kept(name: str, tmp_path: Path) -> None:
    for split, count in (("train", 4), (name, 3)):
        for label in ("cat", "dog"):
            fill(tmp_path / split / label, count)
    data = open_data(str(tmp_path), 8)
    assert (len(data.train), len(data.val)) == (8, 6)
    assert [data.val[i][1] for i in range(6)] == [0, 0, 0, 1, 1, 1]


def test_training_images_alone_are_split(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        fill(tmp_path / "train" / label, 5)
    data = open_data(str(tmp_path), 8)
    assert (len(data.train), len(data.val)) == (8, 2)
    assert data.preprocess.classes == ("cat", "dog")


def test_folders_within_classes_and_other_files_do_not_disturb(tmp_path: Path) -> None:
    fill(tmp_path / "cat" / "2024" / "may", 3)
    fill(tmp_path / "dog", 3)
    (tmp_path / ".git").mkdir()
    (tmp_path / "README.md").write_text("images of cats and dogs")
    (tmp_path / "dog" / "labels.csv").write_text("dog")
    data = open_data(str(tmp_path), 8)
    assert (data.preprocess.classes, len(data.train) + len(data.val)) == (("cat", "dog"), 6)


def test_a_sample_is_known_by_its_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        fill(tmp_path / "one" / name, 5)
    found = digest(open_data(str(tmp_path / "one"), 8).train, range(8))
    # Neither place nor size changes it; one pixel does.
    (tmp_path / "one").rename(tmp_path / "two")
    two = open_data(str(tmp_path / "two"), 16)
    assert digest(two.train, range(8)) == found
    assert isinstance(two.train, FolderSplit)
    Image.new("RGB", (20, 30)).save(two.train.path(3))
    assert digest(two.train, range(8)) != found


def test_the_content_decides_and_not_the_ending(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        fill(tmp_path / name, 2)
    Image.new("RGB", (20, 30), (9, 9, 9)).save(tmp_path / "cat" / "image 0.png", "JPEG")
    data = open_data(str(tmp_path), 8)
    assert {tuple(data.train[i][0].shape) for i in range(2)} == {(3, 8, 8)}


def test_links_that_lead_nowhere_or_in_circles_are_no_images(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        fill(tmp_path / name, 2)
    (tmp_path / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "cat" / "self.png").symlink_to("self.png")
    (tmp_path / "dog" / "up").symlink_to(tmp_path, target_is_directory=True)
    os.mkfifo(tmp_path / "dog" / "pipe.png")
    data = open_data(str(tmp_path), 8)
    assert data.preprocess.classes == ("cat", "dog")
    assert len(data.train) + len(data.val) == 4


def test_a_class_without_images_is_named(tmp_path: Path) -> None:
    fill(tmp_path / "cat", 3)
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "notes.txt").write_text("none yet")
    with pytest.raises(UserError, match=r"--data .*dog: got 0 images; expected at least 2 in every class; add some"):
        open_data(str(tmp_path))


def test_a_single_image_cannot_be_split(tmp_path: Path) -> None:
    fill(tmp_path / "cat", 3)
    fill(tmp_path / "dog", 1)
    with pytest.raises(UserError, match="dog: got 1 images; expected at least 2"):
        open_data(str(tmp_path))


@pytest.mark.parametrize("count", [0, 1])
def test_one_class_is_no_classification(count: int, tmp_path: Path) -> None:
    if count:
        fill(tmp_path / "cat", 3)
    with pytest.raises(UserError, match=f"got {count} class folders; expected class folders with images, or train/"):
        open_data(str(tmp_path))


@pytest.mark.parametrize("odd", ["missing", "extra"])
def test_validation_must_have_the_same_classes(odd: str, tmp_path: Path) -> None:
    train, val = ["cat", "dog", "emu"], ["cat", "dog"]
    for split, labels in (("train", train if odd == "missing" else val), ("val", val if odd == "missing" else train)):
        for label in labels:
            fill(tmp_path / split / label, 2)
    with pytest.raises(UserError, match=r"val: got other classes than train/ \(emu\); expected the same class folders"):
        open_data(str(tmp_path))


def test_a_file_that_is_no_image_is_named_at_once(tmp_path: Path) -> None:
    fill(tmp_path / "cat", 3)
    fill(tmp_path / "dog", 3)
    (tmp_path / "dog" / "broken one.jpg").write_bytes(b"\xff\xd8\xff not a jpeg")
    with pytest.raises(UserError, match=r"broken one\.jpg: got '.*'; expected an image that Pillow can read; remove"):
        open_data(str(tmp_path))


def test_an_image_cut_short_is_named_when_it_is_read(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        fill(tmp_path / "train" / name, 2)
        fill(tmp_path / "val" / name, 2)
    path = tmp_path / "val" / "cat" / "image 0.png"
    path.write_bytes(path.read_bytes()[:60])
    data = open_data(str(tmp_path), 8)
    with pytest.raises(UserError, match=r"image 0\.png: got '.+'; expected an image"):
        data.val[0]
