from __future__ import annotations

import numpy as np
import pytest

from hadaptive_q.data.crop import CentralCrop, RandomCrop


@pytest.mark.parametrize("share", [0.1, 0.875, 1.0])
@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (7, 7), (1, 900)])
def test_the_middle_is_a_square_of_the_shorter_side(width: int, height: int, share: float) -> None:
    left, top, right, bottom = CentralCrop(share).box(width, height)
    assert right - left == pytest.approx(share * min(width, height))
    assert bottom - top == pytest.approx(right - left)
    assert left + right == pytest.approx(width)
    assert top + bottom == pytest.approx(height)
    assert right <= width
    assert bottom <= height


def test_random_parts_are_within_the_image_and_its_limits() -> None:
    crop = RandomCrop(0.08, np.random.default_rng(0))
    boxes = np.array([crop.box(500, 375) for _ in range(2000)])
    wide, high = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0
    assert (boxes[:, 2] <= 500).all()
    assert (boxes[:, 3] <= 375).all()
    shares, ratios = wide * high / (500 * 375), wide / high
    assert 0.08 <= shares.min() < 0.1
    assert 0.9 < shares.max() <= 1
    # Areas are uniform but for the largest, of which many fit only in part: 0.54, less what was drawn again.
    assert 0.4 < shares.mean() < 0.54
    assert 0.75 <= ratios.min() < 0.78
    assert 1.28 < ratios.max() <= 4 / 3 + 1e-9


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 100), (3000, 2)])
def test_an_image_too_narrow_gives_its_middle(width: int, height: int) -> None:
    crop = RandomCrop(0.9, np.random.default_rng(0))
    for _ in range(20):
        left, top, right, bottom = crop.box(width, height)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height


def test_the_generator_decides() -> None:
    one, again, other = (RandomCrop(0.2, np.random.default_rng(seed)).box(40, 30) for seed in (1, 1, 2))
    assert one == again != other
