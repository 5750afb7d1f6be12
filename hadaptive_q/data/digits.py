"""`digits`: 1,797 real handwritten digits of 8x8 pixels, embedded in scikit-learn.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from hadaptive_q.data.datasets import ImageData, TensorSplit, held_out
from hadaptive_q.models.config import Preprocess

IMAGE_SIZE = 64


def open_digits(image_size: int | None = None) -> ImageData:
    """Return the set at `image_size` (64), with a fixed stratified split: one fifth of every class validates."""
    size = image_size or IMAGE_SIZE
    raw = load_digits()
    pixels = raw.images.astype(np.uint8)  # 0..16
    images = torch.from_numpy(pixels).float()[:, None] * (255 / 16)
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    images = images.round().to(torch.uint8).expand(-1, 3, -1, -1)

    def split(indices: list[int]) -> TensorSplit:
        return TensorSplit(images[indices], raw.target[indices].tolist(), [pixels[i].tobytes() for i in indices])

    train, val = held_out(raw.target)
    preprocess = Preprocess(
        image_size=size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), classes=tuple(str(c) for c in range(10))
    )
    return ImageData("digits", preprocess, split(train), split(val), mirror=False)
