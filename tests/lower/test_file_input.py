"""Images reach a file in its own type and layout."""

from __future__ import annotations

import pytest
import torch

from hadaptive_q.data.transforms import normalise
from hadaptive_q.lower.file_input import FileInput
from hadaptive_q.models.config import Preprocess

PREPROCESS = Preprocess(image_size=4, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0), classes=("a",))
IMAGES = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)


def test_floats_are_normalised() -> None:
    given = FileInput("float32", (1, 3, 4, 4))
    assert torch.equal(given.of(IMAGES, PREPROCESS), normalise(IMAGES, PREPROCESS))


@pytest.mark.parametrize("shape", [(1, 4, 4, 3), (1, 3, 4, 4)])
def test_bytes_stay_bytes(shape: tuple[int, ...]) -> None:
    given = FileInput("uint8", shape)
    assert given.image_size == 4
    for images in (IMAGES, IMAGES.contiguous(memory_format=torch.channels_last)):
        fed = given.of(images, PREPROCESS)
        assert (fed.dtype, tuple(fed.shape[1:])) == (torch.uint8, shape[1:])
        assert fed.is_contiguous()
        row, column = 1, 2
        pixel = fed[1, :, row, column] if shape[1] == 3 else fed[1, row, column]
        assert torch.equal(pixel, IMAGES[1, :, row, column])


def test_named_as_a_user_reads_it() -> None:
    assert str(FileInput("uint8", (1, 64, 64, 3))) == "uint8 (1, 64, 64, 3)"
