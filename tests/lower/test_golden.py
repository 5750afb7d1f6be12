"""The golden images are what their formula says, the same on every machine."""

from __future__ import annotations

import hashlib

import torch

from hadaptive_q.lower.golden import golden_images


def test_pixels_follow_the_formula() -> None:
    images = golden_images(48)
    assert images.shape == (4, 3, 48, 48)
    assert images.dtype == torch.uint8
    for n, c, y, x in [(0, 0, 0, 0), (0, 1, 5, 9), (3, 2, 47, 46)]:
        assert images[n, c, y, x] == ((5 + 2 * n) * x + 7 * y + 85 * c + x * y // 8) % 256


def test_they_differ_and_use_every_byte() -> None:
    images = golden_images(32)
    assert len({image.numpy().tobytes() for image in images}) == 4
    assert len(images.unique()) == 256


def test_they_never_change() -> None:
    # Passports hold answers to these very bytes.
    digest = hashlib.sha256(golden_images(32).numpy().tobytes()).hexdigest()
    assert digest == "18592f4e36bb30353bf1914f4048ce1680bb67c3dda68e6ddc90723702e92ebe"
