"""One image file to one uint8 tensor: decode, upright, RGB, and a part of it resized to a square."""

from __future__ import annotations

import io
import math
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from hadaptive_q.data.crop import Box, CentralCrop, Crop
from hadaptive_q.errors import UserError, first_line

_WHOLE = CentralCrop()
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
        raise UserError(str(path), f"'{first_line(error)}'", _EXPECTED, "remove or replace the file") from error


def decode(data: bytes, size: int, where: str, crop: Crop = _WHOLE) -> Tensor:
    """Return what `crop` takes of the image in `data` as uint8 `(3, size, size)`.

    `where` names the image in the error raised when it cannot be decoded.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns between one and two times its pixel limit and raises above: refuse both.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                width, height = _upright_size(image)
                box = crop.box(width, height)
                if crop.quick:
                    _decode_small(image, box, size)
                upright = _eight_bits(ImageOps.exif_transpose(image)).convert("RGB")
    except _UNREADABLE as error:
        raise UserError(where, f"'{first_line(error)}'", _EXPECTED, "remove or replace it") from error
    x, y = upright.width / width, upright.height / height
    scaled = (box[0] * x, box[1] * y, min(box[2] * x, upright.width), min(box[3] * y, upright.height))
    fitted = upright.resize((size, size), Image.Resampling.BILINEAR, box=scaled)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).contiguous()


def _upright_size(image: Image.Image) -> tuple[int, int]:
    on_its_side = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return (image.height, image.width) if on_its_side else image.size


def _decode_small(image: Image.Image, box: Box, size: int) -> None:
    """Let a JPEG be decoded at a half, a quarter or an eighth, as long as `box` keeps `size` pixels."""
    share = size / min(box[2] - box[0], box[3] - box[1])
    if share < 1:
        image.draft(None, (math.ceil(image.width * share), math.ceil(image.height * share)))


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grayscale down; Pillow's own conversion cuts every value above 255."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))


def image_bytes(cell: Any, where: str) -> bytes:
    """Return the encoded image in a cell of a table: its bytes, or those of the file it names."""
    if cell is None:
        raise UserError(where, "no image", "an image in every row", "remove the row")
    try:
        return bytes(cell["bytes"]) if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
    except OSError as error:
        raise UserError(where, f"'{error}'", "the file that the row names") from error
