"""One image file to one uint8 tensor: decode, upright, RGB, resize the short side, crop the centre."""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from hadaptive_q.errors import UserError

_EXPECTED = "an image that Pillow can read"
# What Pillow raises for damaged pixels, headers and metadata.
_UNREADABLE = (
    *(UnidentifiedImageError, Image.DecompressionBombError, Image.DecompressionBombWarning, struct.error, SyntaxError),
    *(OSError, EOFError, ValueError, TypeError, LookupError, ArithmeticError),
)


def check_header(path: Path) -> None:
    """Raise UserError unless `path` starts like an image; reads only its first bytes."""
    try:
        with Image.open(path):
            pass
    except _UNREADABLE as error:
        raise UserError(str(path), _reason(error), _EXPECTED, "remove or replace the file") from error


def decode(data: bytes, size: int, where: str) -> Tensor:
    """Return the image in `data` as uint8 `(3, size, size)`.

    `where` names the image in the error raised when it cannot be decoded.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns between one and two times its pixel limit and raises above: refuse both.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                upright = _eight_bits(ImageOps.exif_transpose(image)).convert("RGB")
    except _UNREADABLE as error:
        raise UserError(where, _reason(error), _EXPECTED, "remove or replace it") from error
    fitted = ImageOps.fit(upright, (size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).contiguous()


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grayscale down; Pillow's own conversion cuts every value above 255."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))


def _reason(error: Exception) -> str:
    return f"'{str(error).splitlines()[0] if str(error) else type(error).__name__}'"
