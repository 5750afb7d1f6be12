"""The grid of an image that comes as bytes: known before any image is seen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.fx import Node

from hadaptive_q.rewrite.graph import aten

BYTES = 255
# Pixels are ``byte / 255``: with 256 codes for this range, scale 1 / 255 and zero point -128, code = byte - 128.
PIXEL_RANGE = (0.0, 1.0)
VIEWS = (aten.view.default, aten.view_copy.default, aten.reshape.default, aten.permute.default)


def image_readers(image: Node, target: Any) -> Iterator[Node]:
    """Yield the calls of `target` that read `image` as it is or rearranged."""
    for form in rearranged(image):
        yield from (reader for reader in form.users if reader.target == target)


def rearranged(image: Node) -> Iterator[Node]:
    """Yield `image` and every rearranged form of it, in the order of the data."""
    yield image
    for reader in image.users:
        if reader.target in VIEWS:
            yield from rearranged(reader)
