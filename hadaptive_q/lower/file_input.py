"""What a written file takes, and how images become that."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hadaptive_q.data.transforms import normalise
from hadaptive_q.models.config import Preprocess

CHANNELS = 3


@dataclass(frozen=True)
class FileInput:
    """`dtype` is ``float32`` or ``uint8``; `shape` `(1, 3, S, S)`, or `(1, S, S, 3)` where channels come last."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"

    @property
    def image_size(self) -> int:
        """The side of the image in pixels, in either layout."""
        return self.shape[2]

    def of(self, images: Tensor, preprocess: Preprocess) -> Tensor:
        """Return uint8 images `(B, 3, S, S)` as the file takes them: bytes as they are, floats as `preprocess` says."""
        if self.dtype != "uint8":
            return normalise(images, preprocess)
        return (images if self.shape[1] == CHANNELS else images.permute(0, 2, 3, 1)).contiguous()
