"""Every kind of image a folder may hold decodes to upright RGB of one size; what does not is named."""

from __future__ import annotations

import contextlib
import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hadaptive_q.data import image_file
from hadaptive_q.data.crop import CentralCrop, RandomCrop
from hadaptive_q.data.image_file import check_header, decode
from hadaptive_q.errors import UserError


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def ramp(dtype: type = np.uint8, top: int = 255) -> np.ndarray:
    """A 32 x 32 image that rises from 0 on the left to `top` on the right."""
    return np.broadcast_to(np.linspace(0, top, 32).round().astype(dtype), (32, 32)).copy()


RAMP = torch.from_numpy(ramp())
SIXTEEN = ramp(np.uint16, 65535)


@pytest.mark.parametrize(
    ("data", "codes"),
    [
        (encoded(Image.fromarray(ramp())), 0),
        (encoded(Image.fromarray(ramp()).convert("RGB")), 0),
        (encoded(Image.fromarray(ramp()).convert("RGBA")), 0),
        (encoded(Image.fromarray(ramp()).convert("LA")), 0),
        (encoded(Image.fromarray(ramp()).convert("P")), 0),
        (encoded(Image.fromarray(ramp()).convert("CMYK"), "TIFF"), 0),
        (encoded(Image.fromarray(ramp()).convert("CMYK"), "JPEG", quality=95), 4),
        (encoded(Image.fromarray(ramp()).convert("YCbCr"), "JPEG", quality=95), 4),
        (encoded(Image.fromarray(ramp()), "GIF"), 0),
        (encoded(Image.fromarray(ramp()), "BMP"), 0),
        (encoded(Image.fromarray(ramp()), "WEBP", lossless=True), 0),
        (encoded(Image.fromarray(SIXTEEN)), 0),
        (encoded(Image.fromarray(SIXTEEN), "TIFF"), 0),
        (encoded(Image.fromarray(SIXTEEN.astype(np.int32)), "TIFF"), 0),
        (b"P5 32 32 65535\n" + SIXTEEN.byteswap().tobytes(), 0),
    ],
    ids=(
        *("gray", "RGB", "RGBA", "gray+alpha", "palette", "CMYK TIFF", "CMYK JPEG", "JPEG", "GIF", "BMP", "WebP"),
        *("16-bit PNG", "16-bit TIFF", "32-bit TIFF", "16-bit PGM"),
    ),
)
def test_every_kind_of_image_becomes_eight_bit_rgb(data: bytes, codes: int) -> None:
    image = decode(data, 32, "here")
    assert (image.dtype, tuple(image.shape)) == (torch.uint8, (3, 32, 32))
    assert image.is_contiguous()
    for channel in image:
        assert int((channel.int() - RAMP.int()).abs().max()) <= codes  # lossy forms may miss by a few codes


def test_one_bit_images_become_black_and_white() -> None:
    image = decode(encoded(Image.fromarray(ramp()).point(lambda v: 255 * (v > 127)).convert("1")), 32, "here")
    assert image.unique().tolist() == [0, 255]
    assert torch.equal(image[0] > 0, RAMP > 127)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_camera_held_them(orientation: int) -> None:
    upright = np.zeros((32, 32, 3), np.uint8)
    upright[:16, :16] = (255, 0, 0)  # red at the top left,
    upright[16:, :16] = (0, 255, 0)  # green below it
    # How the sensor saw it, by EXIF: the inverse of the turn that makes it upright.
    seen = {
        1: upright,
        2: np.fliplr(upright),
        3: np.rot90(upright, 2),
        4: np.flipud(upright),
        5: np.transpose(upright, (1, 0, 2)),
        6: np.rot90(upright, 1),
        7: np.rot90(np.transpose(upright, (1, 0, 2)), 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode(encoded(Image.fromarray(np.ascontiguousarray(seen)), "PNG", exif=exif), 32, "here")
    assert image[:, 8, 8].tolist() == [255, 0, 0]
    assert image[:, 24, 8].tolist() == [0, 255, 0]
    assert image[:, 8, 24].tolist() == [0, 0, 0]


@pytest.mark.parametrize(("width", "height"), [(64, 32), (32, 64), (320, 32)])
def test_the_centre_is_cropped_without_distortion(width: int, height: int) -> None:
    pixels = np.zeros((height, width), np.uint8)
    pixels[(height - 32) // 2 :, (width - 32) // 2 :][:32, :32] = 200
    image = decode(encoded(Image.fromarray(pixels)), 32, "here")
    assert image.unique().tolist() == [200]


@pytest.mark.parametrize("size", [1, 7, 224])
def test_any_image_is_resized_to_the_wanted_size(size: int) -> None:
    assert decode(encoded(Image.new("L", (1, 50), 90)), size, "here").unique().tolist() == [90]
    assert decode(encoded(Image.fromarray(ramp())), size, "here").shape == (3, size, size)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image",
        encoded(Image.fromarray(ramp()))[:60],
        encoded(Image.fromarray(ramp()), "JPEG")[:200],
        b"GIF89a",
        b"P5 32 32 255\n" + b"x" * 5,
    ],
    ids=["empty", "text", "PNG cut", "JPEG cut", "GIF head", "PGM cut"],
)
def test_what_cannot_be_decoded_is_named(data: bytes) -> None:
    with pytest.raises(UserError, match=r"^here: got '.+'; expected an image that Pillow can read; remove or replace"):
        decode(data, 32, "here")


@pytest.mark.parametrize("limit", [100, 600])
def test_decompression_bombs_are_refused(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.fromarray(ramp()))  # 1,024 pixels: above twice the first limit, below twice the second
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(UserError, match=r"here: got '.*decompression bomb"):
        decode(data, 32, "here")


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_picture_counts(form: str) -> None:
    first, second = Image.new("RGB", (8, 8), (250, 0, 0)), Image.new("RGB", (8, 8), (0, 250, 0))
    image = decode(encoded(first, form, save_all=True, append_images=[second]), 8, "here")
    assert int(image[0].min()) > 240
    assert int(image[1].max()) < 10


def seeds() -> list[bytes]:
    """Small images of every form, some with metadata, some with a second picture."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    more = {"save_all": True, "append_images": [image.rotate(90)]}
    return [
        *(encoded(image, form) for form in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")),
        *(encoded(image, form, exif=exif) for form in ("PNG", "JPEG", "WEBP")),
        *(encoded(image, form, **more) for form in ("PNG", "GIF")),
        encoded(image.convert("CMYK"), "JPEG"),
        encoded(image.convert("P"), "PNG"),
        encoded(Image.fromarray(SIXTEEN)),
    ]


@given(
    data=st.sampled_from(seeds()),
    cut=st.none() | st.integers(0, 4000),
    changes=st.lists(st.tuples(st.integers(0, 250) | st.integers(0, 4000), st.integers(0, 255)), max_size=8),
)
def test_any_damage_is_an_image_or_one_line(data: bytes, cut: int | None, changes: list[tuple[int, int]]) -> None:
    damaged = bytearray(data[:cut])
    for place, value in changes:
        if damaged:
            damaged[place % len(damaged)] = value
    with contextlib.suppress(UserError):
        assert decode(bytes(damaged), 8, "here").shape == (3, 8, 8)


def test_damaged_metadata_is_named() -> None:
    """An orientation, of which nothing is left to turn the image by."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(ramp()), "JPEG", exif=exif)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_file.ImageOps, "exif_transpose", lambda _: struct.unpack("<H", b""))
        with pytest.raises(UserError, match=r"here: got '.*requires a buffer.*'; expected an image"):
            decode(data, 8, "here")


def test_check_header_reads_the_kind_and_not_the_pixels(tmp_path: Path) -> None:
    good, cut, text = tmp_path / "good.png", tmp_path / "cut.png", tmp_path / "text.png"
    good.write_bytes(encoded(Image.fromarray(ramp())))
    cut.write_bytes(good.read_bytes()[:60])
    text.write_text("not an image")
    check_header(good)
    check_header(cut)
    with pytest.raises(UserError, match=r"text\.png: got '.*'; expected an image"):
        check_header(text)
    with pytest.raises(UserError, match=r"missing\.png: got"):
        check_header(tmp_path / "missing.png")


def test_the_middle_may_be_smaller_than_the_image() -> None:
    pixels = np.zeros((64, 96), np.uint8)
    pixels[8:56, 24:72] = 200  # the square of three quarters of 64
    data = encoded(Image.fromarray(pixels))
    assert decode(data, 48, "here", CentralCrop(0.75)).unique().tolist() == [200]
    assert decode(data, 48, "here").unique().tolist() != [200]


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("quick", [True, False])
def test_a_random_part_is_of_the_upright_image(quick: bool, orientation: int) -> None:
    """A ramp from the top to the bottom: columns are alike, rows are not, however the file has it."""
    upright = np.broadcast_to(np.linspace(0, 255, 800).astype(np.uint8)[:, None], (800, 600))
    exif = Image.Exif()
    exif[0x0112] = orientation
    seen = upright if orientation == 1 else np.rot90(upright, 1)
    data = encoded(Image.fromarray(np.ascontiguousarray(seen)), "JPEG", exif=exif, quality=95)
    crop = RandomCrop(0.2, np.random.default_rng(3), quick)
    _, top, _, bottom = RandomCrop(0.2, np.random.default_rng(3)).box(600, 800)
    image = decode(data, 32, "here", crop)[0].float()
    assert float((image.amax(1) - image.amin(1)).max()) <= 3
    expected = 255 / 799 * (top + (np.arange(32) + 0.5) / 32 * (bottom - top) - 0.5)
    assert np.abs(image.mean(1).numpy() - expected).max() <= 3
