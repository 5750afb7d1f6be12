from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hadaptive_q.data.mix import Mix
from hadaptive_q.recipe import AugmentConfig

COUNT, CLASSES, SIDE = 8, 8, 10


def batch() -> tuple[Tensor, Tensor]:
    """Image `i` is `i` everywhere and of class `i`: what is in a mixed image says what it is of."""
    values = torch.arange(COUNT)
    return values.float()[:, None, None, None].expand(-1, 3, SIDE, SIDE).contiguous(), values


def mixed(seed: int, **settings: float) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return Mix(AugmentConfig(**settings), CLASSES)(*batch())


def test_without_settings_nothing_changes_and_no_number_is_drawn() -> None:
    inputs, labels = mixed(3)
    assert torch.equal(inputs, batch()[0])
    assert torch.equal(labels, batch()[1])
    after = torch.rand(())
    torch.manual_seed(3)
    assert after == torch.rand(())


@pytest.mark.parametrize("settings", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}])
def test_labels_have_the_shares_of_the_pixels(settings: dict[str, float]) -> None:
    values = torch.arange(CLASSES).float()
    for seed in range(30):
        inputs, shares = mixed(seed, **settings)
        assert shares.shape == (COUNT, CLASSES)
        torch.testing.assert_close(shares.sum(1), torch.ones(COUNT))
        assert int((shares > 0).sum(1).max()) <= 2
        # The mean of the pixels is the mean of the classes.
        torch.testing.assert_close(inputs.mean((1, 2, 3)), shares @ values, atol=1e-4, rtol=0)


def test_mixup_blends_and_cutmix_pastes() -> None:
    blended = [mixed(seed, mixup=1.0)[0] for seed in range(10)]
    assert all((image.amax((1, 2, 3)) - image.amin((1, 2, 3))).max() < 1e-6 for image in blended)
    assert any((image != image.round()).any() for image in blended)
    pasted = [mixed(seed, cutmix=1.0)[0] for seed in range(10)]
    assert all((image == image.round()).all() for image in pasted)
    assert any(len(image[i].unique()) == 2 for image in pasted for i in range(COUNT))


def test_both_take_turns() -> None:
    pasted = [bool((mixed(seed, mixup=1.0, cutmix=1.0)[0] % 1 == 0).all()) for seed in range(60)]
    assert 15 < sum(pasted) < 45  # half of them: 4 standard deviations
