"""Images that a formula gives: whoever has a file can make them, on a phone too, and compare its answers."""

from __future__ import annotations

import torch
from torch import Tensor

IMAGES = 4


def golden_images(size: int) -> Tensor:
    """Return uint8 images `(4, 3, size, size)`.

    ``image[n, c, y, x] = ((5 + 2 n) x + 7 y + 85 c + x y // 8) mod 256``: gradients and edges of many sizes, and every
    value of a byte. No image of anybody's data.
    """
    n, c, y, x = torch.meshgrid(
        torch.arange(IMAGES), torch.arange(3), torch.arange(size), torch.arange(size), indexing="ij"
    )
    return (((5 + 2 * n) * x + 7 * y + 85 * c + x * y // 8) % 256).to(torch.uint8)
