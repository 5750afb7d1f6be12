"""StarNet: depthwise convolutions and the star operation, an element-wise product of two branches.

Source: arXiv 2403.19967 ("Rewrite the Stars"). Convolutions have biases, those with a BatchNorm behind them, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import PositiveInt
from torch import Tensor, nn

from hadaptive_q.models.blocks import Convolution, NormHead
from hadaptive_q.models.config import NetworkConfig, StageConfig
from hadaptive_q.models.network import Family, Network


class StarNetConfig(NetworkConfig):
    """Stage `i` has ``base * 2^i`` channels and ``depths[i]`` blocks, whose branches have `ratio` times as many."""

    family: Literal["starnet"] = "starnet"
    stem: PositiveInt = 32
    base: PositiveInt
    depths: tuple[PositiveInt, ...]
    ratio: PositiveInt = 4

    @property
    def stride(self) -> int:
        return 2 << len(self.depths)

    @property
    def stages(self) -> Sequence[StageConfig]:
        return [StageConfig(channels=self.base << i, depth=depth) for i, depth in enumerate(self.depths)]


class StarBlock(nn.Module):
    """``x + dw2(g(relu6(f1(y)) * f2(y)))`` with ``y = dw1(x)``; both depthwise convolutions are 7x7.

    Shapes: `(B, C, H, W) -> (B, C, H, W)`; the product has `ratio C` channels.
    """

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        wide = ratio * channels
        self.dw1 = Convolution(channels, channels, 7, groups=channels)
        self.f1 = Convolution(channels, wide, norm=False)
        self.f2 = Convolution(channels, wide, norm=False)
        self.act = nn.ReLU6()
        self.g = Convolution(wide, channels)
        self.dw2 = Convolution(channels, channels, 7, groups=channels, norm=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dw1(x)
        out: Tensor = x + self.dw2(self.g(self.act(self.f1(y)) * self.f2(y)))
        return out


class StarNet(Network):
    """The float network; what comes down a size counts as a block, too."""

    config: StarNetConfig

    def __init__(self, config: StarNetConfig) -> None:
        super().__init__(config)
        self.stem = nn.Sequential(Convolution(3, config.stem, 3, 2), nn.ReLU6())
        channels, blocks = config.stem, list[nn.Module]()
        for stage in config.stages:
            blocks.append(Convolution(channels, stage.channels, 3, 2))
            channels = stage.channels
            blocks += [StarBlock(channels, config.ratio) for _ in range(stage.depth)]
        self.blocks = nn.Sequential(*blocks)
        self.head = NormHead(channels, config.num_classes)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.stem(x)))
        return out


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


VARIANTS = {
    config.name: config
    for config in (
        # Two stages at a size that trains in seconds: for tests and first tries.
        StarNetConfig(name="starnet_nano", stem=8, base=8, depths=(1, 1)),
        StarNetConfig(name="starnet_s1", base=24, depths=(2, 2, 8, 3)),
        StarNetConfig(name="starnet_s2", base=32, depths=(1, 2, 6, 2)),
        StarNetConfig(name="starnet_s3", base=32, depths=(2, 2, 8, 4)),
        StarNetConfig(name="starnet_s4", base=32, depths=(3, 3, 12, 5)),
    )
}
FAMILY = Family(StarNetConfig, StarNet, VARIANTS)
