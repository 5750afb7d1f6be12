"""StarNet has the size that the paper states, and its blocks are the star operation."""

from __future__ import annotations

import pytest
import torch

from hadaptive_q.models.families import create_model
from hadaptive_q.models.network import count_macs, count_parameters
from hadaptive_q.models.starnet import StarBlock, StarNetConfig

# Parameters in millions and multiply-accumulates in millions at 224, 1000 classes: table 8 of the paper.
PUBLISHED = {
    "starnet_s1": (2.9, 425, 2_869_168),
    "starnet_s2": (3.7, 547, 3_682_024),
    "starnet_s3": (5.8, 757, 5_750_792),
    "starnet_s4": (7.5, 1075, 7_482_728),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_macs_are_the_papers(name: str) -> None:
    millions, macs, parameters = PUBLISHED[name]
    model = create_model(name, 1000)
    # Of a block with C channels 12 C^2 + 113 C, counted by hand.
    assert count_parameters(model) == parameters
    assert round(parameters / 1e6, 1) == millions
    # The paper counts norms and activations as well.
    assert 0.97 * macs < count_macs(model, 224) / 1e6 < macs


def test_stages_double_their_channels() -> None:
    config = create_model("starnet_s1").config
    assert isinstance(config, StarNetConfig)
    assert [(stage.channels, stage.depth) for stage in config.stages] == [(24, 2), (48, 2), (96, 8), (192, 3)]
    assert config.stride == 32
    assert not config.selects


def test_a_block_multiplies_its_branches() -> None:
    torch.manual_seed(0)
    block, x = StarBlock(4, 3).eval(), torch.randn(2, 4, 9, 9)
    with torch.no_grad():
        for conv in (block.f1.conv, block.f2.conv):
            torch.nn.init.zeros_(conv.weight)
        torch.nn.init.constant_(block.f1.conv.bias, 7.0)  # above 6: the clamp is at work
        torch.nn.init.constant_(block.f2.conv.bias, -0.5)
        wanted = x + block.dw2(block.g(torch.full((2, 12, 9, 9), 6.0 * -0.5)))
        torch.testing.assert_close(block(x), wanted)
