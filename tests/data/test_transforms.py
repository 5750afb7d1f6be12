from __future__ import annotations

import pytest
import torch

from hadaptive_q.data.transforms import Augment, normalise
from hadaptive_q.models.config import Preprocess
from hadaptive_q.recipe import AugmentConfig

PREPROCESS = Preprocess(image_size=8, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0), classes=("a",))
NONE = AugmentConfig(degrees=0, translate=0, scale=0, mirror=False)
CODE = 1 / 255 / 0.25  # one code of a pixel in the units of the most sensitive channel


def images(count: int = 4) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_normalise_is_its_formula() -> None:
    x = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 3, 1, 1)
    assert normalise(x, PREPROCESS).flatten().tolist() == pytest.approx([-1.0, (0.2 - 0.25) / 0.25, 1.0])
    assert normalise(images(), PREPROCESS).dtype == torch.float32


@pytest.mark.parametrize(
    "stored",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        lambda x: x[:, :1].expand(-1, 3, -1, -1),
        lambda x: x.flip(3).flip(3)[:, :, ::1],
        lambda x: torch.cat((x, x), dim=3)[..., ::2],
    ],
    ids=["channels last", "permuted", "expanded gray", "flipped", "strided"],
)
def test_normalised_inputs_are_contiguous_whatever_came(stored: object) -> None:
    x = stored(images())  # type: ignore[operator]
    got = normalise(x, PREPROCESS)
    assert got.is_contiguous()
    # Strides of size-1 dimensions say nothing, so a batch of one is where a wrong layout hides.
    assert normalise(x[:1], PREPROCESS).stride() == torch.empty(1, *x.shape[1:]).stride()
    assert torch.equal(got, normalise(x.contiguous(), PREPROCESS))


def test_augmentation_of_nothing_is_normalisation() -> None:
    augment = Augment(NONE, PREPROCESS, mirror=True)
    torch.testing.assert_close(augment(images()), normalise(images(), PREPROCESS), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("wanted", "sound", "mirrors"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_images_are_mirrored_where_recipe_and_data_allow_it(wanted: bool, sound: bool, mirrors: bool) -> None:
    torch.manual_seed(0)
    config = NONE.model_copy(update={"mirror": wanted})
    x = images(64)
    y, plain = Augment(config, PREPROCESS, sound)(x), normalise(x, PREPROCESS)
    mirrored = sum(torch.allclose(a, b.flip(2), atol=1e-5) for a, b in zip(y, plain, strict=True))
    kept = sum(torch.allclose(a, b, atol=1e-5) for a, b in zip(y, plain, strict=True))
    assert mirrored + kept == 64
    assert (16 < mirrored < 48) == mirrors  # half of them: 4 standard deviations
    assert (mirrored == 0) == (not mirrors)


def test_augmentation_follows_the_seed_and_leaves_its_input_alone() -> None:
    augment, x = Augment(AugmentConfig(), PREPROCESS, mirror=True), images()
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(augment(x))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert torch.equal(x, images())


def test_augmented_inputs_stay_in_the_range_of_pixels() -> None:
    torch.manual_seed(0)
    y = Augment(AugmentConfig(degrees=90, translate=0.5, scale=0.5), PREPROCESS, mirror=True)(images(32))
    assert (y.dtype, tuple(y.shape), y.is_contiguous()) == (torch.float32, (32, 3, 8, 8), True)
    bounds = [((0 - m) / s, (1 - m) / s) for m, s in zip(PREPROCESS.mean, PREPROCESS.std, strict=True)]
    for channel, (low, high) in enumerate(bounds):
        assert y[:, channel].min() >= low - 1e-5
        assert y[:, channel].max() <= high + 1e-5


def test_what_is_moved_in_is_the_border() -> None:
    torch.manual_seed(0)
    flat = torch.full((16, 3, 8, 8), 200, dtype=torch.uint8)
    y = Augment(AugmentConfig(degrees=45, translate=0.4, scale=0.4), PREPROCESS, mirror=False)(flat)
    # No black corners: a constant image stays what it is.
    assert float((y - normalise(flat, PREPROCESS)).abs().max()) < 0.1 * CODE


@pytest.mark.parametrize(("field", "value"), [("degrees", 30.0), ("translate", 0.3), ("scale", 0.3)])
def test_every_change_alone_changes_images(field: str, value: float) -> None:
    torch.manual_seed(0)
    y = Augment(NONE.model_copy(update={field: value}), PREPROCESS, mirror=False)(images())
    assert float((y - normalise(images(), PREPROCESS)).abs().max()) > 10 * CODE


def test_randaugment_changes_groups_of_a_batch_each_in_its_way() -> None:
    torch.manual_seed(0)
    one = images(1)
    x = one.expand(64, 3, 8, 8)
    y = Augment(NONE.model_copy(update={"randaugment": 10}), PREPROCESS, mirror=False)(x)
    assert (y.shape, y.dtype, y.is_contiguous()) == (x.shape, torch.float32, True)
    pixels = y * torch.tensor(PREPROCESS.std)[:, None, None] + torch.tensor(PREPROCESS.mean)[:, None, None]
    assert pixels.min() >= -1e-5
    assert pixels.max() <= 1 + 1e-5
    assert not torch.allclose(y, normalise(x, PREPROCESS), atol=10 * CODE)
    groups = [part.mean((0, 1)) for part in y.split(16)]
    assert len({round(float(group.sum()), 3) for group in groups}) == 4


def test_magnitudes_of_randaugment_differ() -> None:
    x = images(32)
    moved = []
    for magnitude in (1, 25):
        torch.manual_seed(2)
        y = Augment(NONE.model_copy(update={"randaugment": magnitude}), PREPROCESS, mirror=False)(x)
        moved.append(float((y - normalise(x, PREPROCESS)).abs().mean()))
    assert moved[0] < moved[1]
