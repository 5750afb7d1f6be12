"""Image data by name: embedded sets, a folder of class folders, or the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hadaptive_q.data.datasets import ImageData
from hadaptive_q.errors import UserError, nearest


def open_data(
    name: str, image_size: int | None = None, crop: float | None = None, workers: int | None = None
) -> ImageData:
    """Open `digits`, `glyphs`, a folder of class folders or of tar shards, ``hf:NAME`` or ``hf-stream:NAME``.

    `image_size` replaces the source's own size (64 for embedded sets, 224 otherwise), `crop` is as in `Preprocess`, and
    `workers` processes read it (None: as many as are worth it; embedded sets lie in memory as they are).
    Raises UserError where nothing of that name exists or its content is unusable.
    """
    # Imported here: each source brings a library that the others do not need.
    from hadaptive_q.data.encoded import View

    view = View(image_size, crop or 1.0, workers)
    source, colon, rest = name.partition(":")
    if colon and source in ("hf", "hf-stream"):
        from hadaptive_q.data.hub import open_hub, open_stream

        return open_hub(rest, view) if source == "hf" else open_stream(rest, view)
    embedded: dict[str, Callable[[int | None], ImageData]] = {"digits": _digits, "glyphs": _glyphs}
    if name in embedded:
        return embedded[name](image_size)
    if not Path(name).is_dir():
        hint = nearest(name, embedded)
        raise UserError("--data", repr(name), "digits, glyphs, hf:NAME, or an existing folder of class folders", hint)
    if any(Path(name).glob("*.tar")):
        from hadaptive_q.data.tar import open_tars

        return open_tars(Path(name), view)
    from hadaptive_q.data.folder import open_folder

    return open_folder(Path(name), view)


def _digits(image_size: int | None) -> ImageData:
    from hadaptive_q.data.digits import open_digits

    return open_digits(image_size)


def _glyphs(image_size: int | None) -> ImageData:
    from hadaptive_q.data.glyphs import open_glyphs

    return open_glyphs(image_size)
