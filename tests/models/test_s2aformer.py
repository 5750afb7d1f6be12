"""S2AFormer has the sizes that were published, and its blocks do the published steps."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from hadaptive_q.models.families import create_model
from hadaptive_q.models.network import count_macs, count_parameters
from hadaptive_q.models.s2aformer import (
    ChannelNorm,
    HybridBlock,
    HybridConfig,
    S2AFormerConfig,
    StripAttention,
)

# Parameters and multiply-accumulates in millions at 224, 1000 classes, and the products inside the attention.
PUBLISHED = {
    "s2aformer_mini": (5.02, 430, 21),
    "s2aformer_t": (5.80, 655, 33),
    "s2aformer_xs": (6.54, 786, 44),
    "s2aformer_s": (10.69, 1380, 60),
    "s2aformer_m": (24.87, 4120, 94),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_macs_are_near_the_published(name: str) -> None:
    millions, macs, products = PUBLISHED[name]
    with torch.device("meta"):
        model = create_model(name, 1000)
    assert count_parameters(model) / 1e6 == pytest.approx(millions, rel=0.03)
    counted = count_macs(model, 224) / 1e6
    # Nobody says whether the attention's products count: either way it is near.
    assert counted == pytest.approx(macs, rel=0.05)
    assert counted - products == pytest.approx(macs, rel=0.05)


def test_every_size_from_the_stride_on_works() -> None:
    model = create_model("s2aformer_nano", 10).eval()
    assert model.config.stride == 8
    for height, width in ((8, 8), (9, 15), (32, 20)):
        assert model(torch.randn(2, 3, height, width)).shape == (2, 10)
    assert create_model("s2aformer_mini").config.stride == 32


@pytest.mark.parametrize("heads", [1, 2])
def test_attention_is_the_libraries(heads: int) -> None:
    torch.manual_seed(0)
    config = S2AFormerConfig(name="try", levels=(), key=3)
    attention = StripAttention(8, config, HybridConfig(channels=8, depth=1, reduction=2, heads=heads)).eval()
    x = torch.randn(2, 8, 6, 4)
    with torch.no_grad():
        reduced = attention.reduce(x)
        assert reduced.shape == (2, 8, 3, 2)

        def split(rows: torch.Tensor) -> torch.Tensor:
            return rows.reshape(2, heads, -1, rows.shape[2] * rows.shape[3]).transpose(2, 3)

        parts = (split(layer) for layer in (attention.query(x), attention.key(reduced), attention.value(reduced)))
        mixed = functional.scaled_dot_product_attention(*parts)
        wanted = attention.projection(mixed.transpose(2, 3).reshape(2, 8, 6, 4))
        torch.testing.assert_close(attention(x), wanted)


def test_a_block_does_its_steps_in_the_published_order() -> None:
    torch.manual_seed(0)
    block = HybridBlock(S2AFormerConfig(name="try", levels=()), HybridConfig(channels=8, depth=1)).eval()
    x = torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        y = block.first(x) + x
        for norm, step in (
            (block.attention_norm, block.attention),
            (block.local_norm, block.local),
            (block.mlp_norm, block.mlp),
        ):
            y = step(norm(y)) + y
        torch.testing.assert_close(block(x), y)


def test_the_norm_sees_the_channels_of_one_pixel() -> None:
    torch.manual_seed(0)
    norm, x = ChannelNorm(6, 1e-5), 3 * torch.randn(2, 6, 4, 5) + 7
    with torch.no_grad():
        pixel = norm(x)[1, :, 2, 3]
    assert pixel.mean().abs() < 1e-5
    assert pixel.var(unbiased=False) == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(pixel, functional.layer_norm(x[1, :, 2, 3], (6,)))
