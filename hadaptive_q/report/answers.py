"""Which validation images were answered right, image by image: what a paired comparison of two networks needs."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hadaptive_q.report.record import Answers


def record_answers(images: str, labels: Sequence[int], float_right: ArrayLike, pte_right: ArrayLike) -> Answers:
    """Return the record of both networks' right answers, booleans `(N,)`; `images` is a digest of the images."""
    before, after = (np.asarray(right, dtype=bool) for right in (float_right, pte_right))
    return Answers(
        split=split_digest(images, labels),
        float_right=pack(before),
        pte_right=pack(after),
        lost=int((before & ~after).sum()),
        won=int((~before & after).sum()),
    )


def split_digest(images: str, labels: Sequence[int]) -> str:
    """Return the digest by which two runs know that they answered the same images; `images` is one of their own."""
    return f"sha256:{hashlib.sha256(f'{images} {list(labels)}'.encode()).hexdigest()}"


def pack(right: NDArray[np.bool_]) -> str:
    """Return booleans `(N,)` as base64 of their bits, the first image in the highest bit."""
    return base64.b64encode(np.packbits(right).tobytes()).decode()


def unpack(text: str, count: int) -> NDArray[np.bool_]:
    """Return the `count` booleans that `pack` made `text` of. Raises ValueError where it holds another number."""
    bits = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    if len(bits) != -(-count // 8):
        raise ValueError(f"{8 * len(bits)} bits for {count} answers")
    return np.unpackbits(bits, count=count).astype(bool)
