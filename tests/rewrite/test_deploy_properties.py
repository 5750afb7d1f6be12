"""Networks of random shape: the deploy form answers as the network does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hadaptive_q.models.ach import DySoft
from hadaptive_q.models.config import ACHConfig, BlockConfig, ConvConfig, GhostConfig, HadaptiveNetConfig, SlotOrder
from hadaptive_q.models.hadaptive_net import HadaptiveNet
from hadaptive_q.rewrite.deploy import deploy_graph

KERNELS = st.sampled_from([3, 5, 7])


@st.composite
def networks(draw: st.DrawFn) -> HadaptiveNetConfig:
    """A stem, one to three blocks of either kind, a tail; at most a stride of 8."""
    first = draw(st.integers(4, 10))
    blocks: list[BlockConfig] = []
    channels = first
    for _ in range(draw(st.integers(1, 3))):
        stride = draw(st.sampled_from([1, 2])) if len(blocks) < 2 else 1
        k = 2 if stride == 2 else draw(KERNELS)
        wanted = draw(st.sampled_from([channels, draw(st.integers(4, 12))]))
        if draw(st.booleans()):
            norm = draw(st.sampled_from(["dysoft", "batch_norm"]))
            blocks.append(ACHConfig(channels=wanted, cs=draw(st.integers(2, channels)), k=k, s=stride, norm=norm))
        else:
            blocks.append(GhostConfig(channels=wanted, ratio=draw(st.sampled_from([2, 4])), k=k, s=stride))
        channels = wanted
    order: SlotOrder = draw(st.sampled_from(["rank", "channel"]))
    stem = (ConvConfig(channels=5, k=2, s=2, act=False), ConvConfig(channels=first, k=1, s=1))
    return HadaptiveNetConfig(
        name="any", num_classes=3, stem=stem, blocks=tuple(blocks), tail=12, hidden=8, slot_order=order
    )


def filled(config: HadaptiveNetConfig, seed: int) -> HadaptiveNet:
    """Return the network in eval mode, no norm of which is the identity."""
    torch.manual_seed(seed)
    model = HadaptiveNet(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | DySoft):
            nn.init.uniform_(module.weight, 0.6, 1.4)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    with torch.no_grad():
        for _ in range(5):
            model.train()(torch.randn(8, 3, 32, 32))
    return model.eval()


@settings(max_examples=max(1, settings.default.max_examples // 20))
@given(config=networks(), seed=st.integers(0, 2**16))
def test_any_network_deploys_float_equal(
    config: HadaptiveNetConfig, seed: int, assert_float_equal: Callable[[Tensor, Tensor], None]
) -> None:
    model = filled(config, seed)
    inputs = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert_float_equal(deploy_graph(model, 32)(inputs), model(inputs))


@pytest.mark.parametrize("cs", [2, 3])
def test_few_products_behind_a_stride(cs: int, assert_float_equal: Callable[[Tensor, Tensor], None]) -> None:
    """A depthwise convolution of a single product is an ordinary one, which space-to-depth takes."""
    stem = (ConvConfig(channels=5, k=2, s=2, act=False), ConvConfig(channels=5, k=1, s=1))
    blocks = (ACHConfig(channels=10, cs=cs, k=2, s=2),)
    model = filled(HadaptiveNetConfig(name="any", num_classes=3, stem=stem, blocks=blocks, tail=12, hidden=8), 52)
    inputs = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert_float_equal(deploy_graph(model, 32)(inputs), model(inputs))
