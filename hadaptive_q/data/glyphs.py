"""`glyphs`: letters and digits in 62 classes, rendered from the fonts that matplotlib ships.

Every image is one character of one font under a seeded affine distortion, with noise, contrast and a stroke
across it. Rendered once and cached.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from hadaptive_q.atomic import write_with
from hadaptive_q.cache import cache_folder
from hadaptive_q.data.datasets import ImageData, TensorSplit
from hadaptive_q.models.config import Preprocess

IMAGE_SIZE = 64
CHARACTERS = string.digits + string.ascii_letters
_GLYPH_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", *string.ascii_letters)
PER_CLASS = {"train": 164, "val": 82}
SEEDS = {"train": 1, "val": 2}
CANVAS, FONT_PIXELS = 96, 66
# Distortion of one sample, in this order: rotation (rad), log scale x and y, shear, shift x and y (canvas = 2),
# foreground, background (0..1), noise sigma, a stroke's angle (rad), offset (canvas = 2) and strength.
LOW = np.array([-0.2, -0.1, -0.1, -0.2, -0.15, -0.15, 0.6, 0.0, 0.02, 0.0, -0.5, 0.0])
HIGH = np.array([0.2, 0.1, 0.1, 0.2, 0.15, 0.15, 1.0, 0.3, 0.12, 3.1416, 0.5, 0.5])
STROKE_WIDTH = 0.035
CHUNK = 1024


def open_glyphs(image_size: int | None = None) -> ImageData:
    """Return 10,168 training and 5,084 validation images at `image_size` (64)."""
    size = image_size or IMAGE_SIZE
    preprocess = Preprocess(image_size=size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), classes=tuple(CHARACTERS))
    fonts = usable_fonts()
    return ImageData("glyphs", preprocess, _split("train", fonts, size), _split("val", fonts, size), mirror=False)


def usable_fonts() -> list[Path]:
    """Return the fonts that draw all 62 characters as what they are.

    Symbol fonts map letters to placeholder boxes, to mathematical signs or to nothing: the names of their
    glyphs tell.
    """
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return [path for path in sorted(folder.glob("*.ttf")) if _draws_all(path)]


def _draws_all(path: Path) -> bool:
    font = FT2Font(str(path))
    charmap = font.get_charmap()
    glyphs: list[Any] = [charmap.get(ord(c), 0) for c in CHARACTERS]
    # Old-style digits ("oneoldstyle") are digits.
    # Index 0 is the font's "missing" glyph.
    return all(g and font.get_glyph_name(g).startswith(n) for g, n in zip(glyphs, _GLYPH_NAMES, strict=True))


def _split(name: str, fonts: list[Path], size: int) -> TensorSplit:
    generator = np.random.default_rng(SEEDS[name])
    labels = np.repeat(np.arange(len(CHARACTERS)), PER_CLASS[name])
    font_of = generator.integers(len(fonts), size=len(labels))
    # float32 at once: what is drawn is what the identity below names.
    drawn = generator.uniform(LOW, HIGH, size=(len(labels), len(LOW))).astype(np.float32)
    digests = [hashlib.sha256(path.read_bytes()).digest() for path in fonts]
    identities = [
        digests[f] + CHARACTERS[c].encode() + row.tobytes() for f, c, row in zip(font_of, labels, drawn, strict=True)
    ]
    cache = _cache_file(name, size, identities)
    if not cache.is_file():
        images = _render(fonts, font_of, labels, torch.from_numpy(drawn), size, SEEDS[name])
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_with(cache, lambda path: _save(path, images))
    gray = torch.from_numpy(np.load(cache))
    return TensorSplit(gray[:, None].expand(-1, 3, -1, -1), labels.tolist(), identities)


def _save(path: Path, images: np.ndarray) -> None:
    with open(path, "wb") as file:  # a file object: numpy appends .npy to names
        np.save(file, images)


def _cache_file(name: str, size: int, identities: list[bytes]) -> Path:
    # The source decides how a sample is drawn, so it is part of the key.
    key = hashlib.sha256(Path(__file__).read_bytes() + b"".join(identities)).hexdigest()[:16]
    return cache_folder() / f"glyphs-{name}-{size}-{key}.npy"


def _templates(fonts: list[Path]) -> Tensor:
    """Draw every character of every font, centred: float `(fonts, 62, CANVAS, CANVAS)` in 0..1."""
    drawn = torch.zeros(len(fonts), len(CHARACTERS), CANVAS, CANVAS)
    for f, path in enumerate(fonts):
        font = ImageFont.truetype(str(path), FONT_PIXELS)
        for c, character in enumerate(CHARACTERS):
            image = Image.new("L", (CANVAS, CANVAS))
            ImageDraw.Draw(image).text((CANVAS / 2, CANVAS / 2), character, fill=255, font=font, anchor="mm")
            drawn[f, c] = torch.from_numpy(np.array(image)).float() / 255
    return drawn


def _render(
    fonts: list[Path], font_of: np.ndarray, labels: np.ndarray, drawn: Tensor, size: int, seed: int
) -> np.ndarray:
    templates = _templates(fonts)
    noise = torch.Generator().manual_seed(seed)
    chunks = [
        _distort(templates[font_of[rows], labels[rows]], drawn[rows], size, noise) for rows in _chunks(len(labels))
    ]
    return torch.cat(chunks).numpy()


def _chunks(count: int) -> Iterator[slice]:
    for start in range(0, count, CHUNK):
        yield slice(start, start + CHUNK)


def _distort(templates: Tensor, drawn: Tensor, size: int, noise: torch.Generator) -> Tensor:
    """Apply one row of `drawn` to each template: float `(N, CANVAS, CANVAS)` to uint8 `(N, size, size)`."""
    angle, log_x, log_y, shear, shift_x, shift_y, fore, back, sigma, stroke, offset, strength = drawn.T
    cos, sin = angle.cos(), angle.sin()
    x_scale, y_scale = (-log_x).exp(), (-log_y).exp()  # the grid maps output to input: inverse scale
    rows = [
        torch.stack((cos * x_scale, (shear - sin) * x_scale, shift_x), dim=1),
        torch.stack((sin * y_scale, cos * y_scale, shift_y), dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), [len(drawn), 1, size, size], align_corners=False)
    ink = F.grid_sample(templates[:, None], grid, align_corners=False)[:, 0]
    axis = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    distance = (x * stroke.cos()[:, None, None] + y * stroke.sin()[:, None, None] - offset[:, None, None]).abs()
    ink = torch.maximum(ink, (distance < STROKE_WIDTH) * strength[:, None, None])
    image: Tensor = back[:, None, None] + (fore - back)[:, None, None] * ink
    image = image + sigma[:, None, None] * torch.randn(image.shape, generator=noise)
    return image.clamp(0, 1).mul(255).round().to(torch.uint8)
