"""What batches hold: the same with any number of workers, each epoch once, mistakes in one line."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hadaptive_q.data.crop import RandomCrop
from hadaptive_q.data.datasets import ImageData, Split, TensorSplit
from hadaptive_q.data.image_file import decode
from hadaptive_q.data.loader import Draw, batches_of, training_batches
from hadaptive_q.data.sources import open_data
from hadaptive_q.errors import UserError

CROPS = Draw(seed=5, epoch=2, least_area=0.2)
WHOLE = Draw(seed=5, epoch=2, least_area=1.0)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty JPEG of 90 x 60, each with a gradient of its own, in two classes."""
    root = tmp_path_factory.mktemp("photographs")
    ramp = np.linspace(0, 255, 90 * 60).reshape(60, 90)
    for index in range(20):
        pixels = np.stack([ramp, 255 - ramp, np.full_like(ramp, 10 * index)], axis=2).astype(np.uint8)
        path = root / ("a", "b")[index % 2] / f"{index:02}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    return root


def opened(root: Path, workers: int) -> ImageData:
    return open_data(str(root), 32, workers=workers)


def epoch(split: Split, draw: Draw, seed: int = 1, size: int = 3) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    batches = list(training_batches(split, size, draw))
    assert {len(images) for images, _ in batches} == {size}
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


@pytest.mark.parametrize("draw", [CROPS, WHOLE], ids=["crops", "whole"])
def test_the_number_of_workers_changes_nothing(draw: Draw, photographs: Path) -> None:
    found = [epoch(opened(photographs, workers).train, draw) for workers in (0, 1, 2)]
    for images, labels in found[1:]:
        assert torch.equal(images, found[0][0])
        assert torch.equal(labels, found[0][1])


@pytest.mark.parametrize("change", [{"seed": 6}, {"epoch": 3}])
def test_seed_and_epoch_decide_crops(change: dict[str, int], photographs: Path) -> None:
    train = opened(photographs, 0).train
    other = Draw(**{"seed": 5, "epoch": 2, "least_area": 0.2, **change})
    (one, labels), (two, labels_too) = epoch(train, CROPS), epoch(train, other)
    assert torch.equal(labels, labels_too), "the order is of torch's generator"
    assert not torch.equal(one, two)


def test_an_epoch_has_every_sample_once_and_whole_batches(photographs: Path) -> None:
    train = opened(photographs, 0).train
    images, _ = epoch(train, WHOLE, size=2)
    assert len(images) == len(train) == 16
    keys = [{bytes(image.numpy()) for image in part} for part in (images, [train[i][0] for i in range(16)])]
    assert keys[0] == keys[1]
    assert len(epoch(train, WHOLE, size=5)[0]) == 15
    assert len(list(training_batches(train, 100, WHOLE))) == 1, "a split smaller than a batch gives one"


def test_in_order_batches_have_every_sample(photographs: Path) -> None:
    for workers in (0, 2):
        val = opened(photographs, workers).val
        images, labels = zip(*batches_of(val, 3), strict=True)
        assert [len(part) for part in images] == [3, 1]
        assert torch.equal(torch.cat(images), torch.stack([val[i][0] for i in range(4)]))
        assert torch.cat(labels).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_one_line_from_a_worker_too(workers: int, photographs: Path, tmp_path: Path) -> None:
    for path in sorted(photographs.glob("*/*.jpg")):
        copy = tmp_path / path.parent.name / path.name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes()[: 700 if path.name == "07.jpg" else None])
    data = opened(tmp_path, workers)
    read = itertools.chain(batches_of(data.train, 4), batches_of(data.val, 4))
    with pytest.raises(UserError, match=r"07\.jpg: got '.*truncated.*'; expected an image that Pillow can read"):
        list(read)


def test_images_in_memory_are_cropped_alike() -> None:
    ramp = torch.arange(32).mul(8).to(torch.uint8).expand(3, 32, 32)
    split = TensorSplit(ramp[None].repeat(6, 1, 1, 1), [0] * 6, [b""] * 6)
    images, _ = epoch(split, CROPS)
    assert images.shape == (6, 3, 32, 32)
    spans = images.amax((1, 2, 3)).int() - images.amin((1, 2, 3)).int()
    assert int(spans.min()) < 200, "a part of the ramp"
    assert len({bytes(image.numpy()) for image in images}) == 6
    assert torch.equal(epoch(split, WHOLE)[0], split.images)


def test_quick_crops_see_what_exact_ones_see(photographs: Path) -> None:
    """A JPEG decoded at a fraction differs by fine detail alone, and these photographs have none."""
    image = Image.open(next(photographs.glob("a/*.jpg"))).resize((1200, 800))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=95)
    for seed in range(5):
        seen = [
            decode(stream.getvalue(), 32, "here", RandomCrop(0.3, np.random.default_rng(seed), quick=quick)).int()
            for quick in (True, False)
        ]
        assert int((seen[0] - seen[1]).abs().max()) <= 6
