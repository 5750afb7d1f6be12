"""The network that normalises by itself answers as the one that is fed normalised images."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hadaptive_q.data.transforms import normalise
from hadaptive_q.errors import UserError
from hadaptive_q.models.config import Preprocess
from hadaptive_q.models.hadaptive_net import HadaptiveNet
from hadaptive_q.models.pixels import take_pixels

# Different for every channel: a swapped channel shows.
PREPROCESS = Preprocess(image_size=32, mean=(0.485, 0.3, 0.1), std=(0.229, 0.4, 0.7), classes=tuple("0123456789"))
IMAGES = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_same_logits_from_pixels(nano: HadaptiveNet, assert_float_equal: Callable[[Tensor, Tensor], None]) -> None:
    before = {name: tensor.clone() for name, tensor in nano.state_dict().items()}
    folded = take_pixels(nano, PREPROCESS)
    assert folded.preprocess == PREPROCESS.unnormalised
    wanted = nano.stem(normalise(IMAGES, PREPROCESS))
    pixels = normalise(IMAGES, PREPROCESS.unnormalised)
    assert torch.equal(pixels, IMAGES.float() / 255)
    assert_float_equal(folded.stem(pixels), wanted)
    assert_float_equal(folded(pixels), nano(normalise(IMAGES, PREPROCESS)))
    # The given network is left as it was, and only the first convolution and its norm differ.
    changed = {name for name, tensor in folded.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"stem.0.conv.weight", "stem.0.bn.running_mean"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in nano.state_dict().items())


def test_a_convolution_that_pads_is_refused(nano: HadaptiveNet) -> None:
    nano.stem[0].conv = nn.Conv2d(3, 8, 2, 2, padding=1, bias=False)  # type: ignore[union-attr]
    with pytest.raises(UserError, match="first convolution pads"):
        take_pixels(nano, PREPROCESS)
