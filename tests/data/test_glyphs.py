from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from hadaptive_q.data import glyphs
from hadaptive_q.data.datasets import ImageData, TensorSplit, digest
from hadaptive_q.data.sources import open_data


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Three training images and one validation image per class, cached in a folder of the test's own."""
    monkeypatch.setattr(glyphs, "PER_CLASS", {"train": 3, "val": 1})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "hadaptive-q"


def images_of(data: ImageData) -> torch.Tensor:
    assert isinstance(data.train, TensorSplit)
    return data.train.images


def test_fonts_are_those_that_draw_every_character_as_itself() -> None:
    usable = {path.stem for path in glyphs.usable_fonts()}
    there = {path.stem for path in glyphs.usable_fonts()[0].parent.glob("*.ttf")}
    assert {"DejaVuSans", "DejaVuSerif", "STIXGeneral"} <= usable
    # Symbol fonts map letters to boxes or mathematical signs.
    assert {"STIXSizOneSymReg", "STIXNonUni", "cmsy10", "cmex10", "DejaVuSansDisplay"} <= there - usable


def test_glyphs_are_sixty_two_classes_of_images(few: Path) -> None:
    data = open_data("glyphs", 24)
    assert (len(data.train), len(data.val), data.num_classes) == (186, 62, 62)
    assert "".join(data.preprocess.classes) == glyphs.CHARACTERS
    image, label = data.train[100]
    assert (image.dtype, tuple(image.shape), label) == (torch.uint8, (3, 24, 24), 33)
    assert isinstance(data.train, TensorSplit)
    assert Counter(data.train.labels) == dict.fromkeys(range(62), 3)
    assert data.mirror is False, "a mirrored b is a d"
    # Every image shows something: contrast well above its noise (at most 0.14 of the range).
    assert (data.train.images[:, 0].float().flatten(1).std(dim=1) > 8).all()


def test_samples_are_told_apart_and_splits_share_none(few: Path) -> None:
    data = open_data("glyphs", 24)
    train = {data.train.identity(i) for i in range(len(data.train))}
    val = {data.val.identity(i) for i in range(len(data.val))}
    assert (len(train), len(val), len(train & val)) == (186, 62, 0)
    assert len({image.numpy().tobytes() for image in images_of(data)}) == 186


def test_a_second_opening_reads_the_cache(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_data("glyphs", 24)
    assert len(list(few.iterdir())) == 2

    def render_again(*_: object) -> None:
        raise AssertionError("rendered although cached")

    monkeypatch.setattr(glyphs, "_render", render_again)
    assert torch.equal(images_of(open_data("glyphs", 24)), images_of(first))
    with pytest.raises(AssertionError, match="although cached"):
        open_data("glyphs", 20)  # another size is another file


def test_rendering_repeats_exactly(few: Path) -> None:
    first = images_of(open_data("glyphs", 24)).clone()
    for cached in few.iterdir():
        cached.unlink()
    assert torch.equal(images_of(open_data("glyphs", 24)), first)


def test_another_size_is_another_drawing_of_the_same_samples(few: Path) -> None:
    small, large = open_data("glyphs", 24), open_data("glyphs", 48)
    assert digest(small.train, range(186)) == digest(large.train, range(186))
    shrunk = torch.nn.functional.avg_pool2d(images_of(large)[:, :1].float(), 2).flatten(1)
    same = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(shrunk, _gray(small), strict=True)])
    assert same.median() > 0.8  # the noise is drawn per pixel, the glyph is not


def _gray(data: ImageData) -> torch.Tensor:
    return images_of(data)[:, 0].float().flatten(1)
