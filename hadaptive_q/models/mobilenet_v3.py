"""MobileNetV3: inverted bottlenecks with squeeze-and-excitation, a gate that multiplies every channel.

Source: arXiv 1905.02244 ("Searching for MobileNetV3"), Small at width 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, PositiveInt
from torch import Tensor, nn

from hadaptive_q.models.blocks import Head
from hadaptive_q.models.config import NetworkConfig, Norm, SlotOrder
from hadaptive_q.models.network import Family, Network
from hadaptive_q.models.replace_expansion import put_ach

Activation = Literal["relu", "hardswish"]
ACTIVATIONS: dict[Activation, type[nn.Module]] = {"relu": nn.ReLU, "hardswish": nn.Hardswish}


class BottleneckConfig(BaseModel):
    """Expansion to `expanded`, depthwise `k` x `k` with stride `s`, gate where `gated`, projection to `channels`."""

    k: PositiveInt
    expanded: PositiveInt
    channels: PositiveInt
    gated: bool
    act: Activation
    s: PositiveInt = 1


class ACHExpansion(BaseModel):
    """What replaces the expansions of some blocks: `cs` are the chosen channels by the index of the block."""

    cs: dict[int, PositiveInt]
    norm: Norm = "dysoft"


class MobileNetV3Config(NetworkConfig):
    """The shape of a MobileNetV3; the channels of its tail are those of its pooled features and of its hidden layer."""

    family: Literal["mobilenet_v3"] = "mobilenet_v3"
    stem: PositiveInt = 16
    blocks: tuple[BottleneckConfig, ...]
    tail: PositiveInt = 576
    hidden: PositiveInt = 1024
    dropout: float = 0.2
    ach: ACHExpansion | None = None
    slot_order: SlotOrder = "channel"

    @property
    def stride(self) -> int:
        return 2 * math.prod(block.s for block in self.blocks)

    @property
    def stages(self) -> Sequence[BaseModel]:
        return self.blocks

    @property
    def selects(self) -> bool:
        return self.ach is not None

    def with_ach(self, cs: Mapping[str, int], norm: Norm, slot_order: SlotOrder) -> MobileNetV3Config:
        blocks = {int(name.removeprefix("blocks.")): count for name, count in cs.items()}
        return self.model_copy(update={"ach": ACHExpansion(cs=blocks, norm=norm), "slot_order": slot_order})


class ConvNorm(nn.Sequential):
    """``act(BN(conv(x)))`` without convolution bias, padded to keep the size but for the stride `s`.

    Shapes: `(B, c1, H, W) -> (B, c2, ceil(H / s), ceil(W / s))`.
    """

    def __init__(
        self, c1: int, c2: int, k: int = 1, s: int = 1, groups: int = 1, act: Activation | None = None
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, (k - 1) // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(c2)
        if act:
            self.act = ACTIVATIONS[act]()


class Gate(nn.Module):
    """Squeeze-and-excitation: ``x * hardsigmoid(W2 relu(W1 mean_hw(x)))``, one factor per channel and image.

    Shapes: `(B, C, H, W) -> (B, C, H, W)`; the inner layer has a quarter of the channels, in steps of 8.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = rounded(channels / 4)
        self.squeeze = nn.Conv2d(channels, inner, 1)
        self.act = nn.ReLU()
        self.excite = nn.Conv2d(inner, channels, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        # Kept dimensions and (-1, -2) in this order: the form of the mean that XNNPACK takes.
        factor = self.gate(self.excite(self.act(self.squeeze(x.mean((-1, -2), keepdim=True)))))
        out: Tensor = x * factor
        return out


def rounded(channels: float) -> int:
    """Return the multiple of 8 nearest to `channels`, at least 8 and at most a tenth below."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


class Bottleneck(nn.Module):
    """Expansion where it widens, depthwise convolution, gate, linear projection, residual if it fits.

    Shapes: `(B, c1, H, W) -> (B, config.channels, ceil(H / s), ceil(W / s))`.
    """

    def __init__(self, c1: int, config: BottleneckConfig) -> None:
        super().__init__()
        wide, act = config.expanded, config.act
        self.expansion = ConvNorm(c1, wide, act=act) if wide != c1 else nn.Identity()
        self.depthwise = ConvNorm(wide, wide, config.k, config.s, groups=wide, act=act)
        self.gate = Gate(wide) if config.gated else nn.Identity()
        self.projection = ConvNorm(wide, config.channels)
        self.residual = config.s == 1 and c1 == config.channels

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.projection(self.gate(self.depthwise(self.expansion(x))))
        return x + out if self.residual else out


class MobileNetV3(Network):
    """The float network."""

    config: MobileNetV3Config

    def __init__(self, config: MobileNetV3Config) -> None:
        super().__init__(config)
        self.stem = nn.Sequential(ConvNorm(3, config.stem, 3, 2, act="hardswish"))
        channels, blocks = config.stem, []
        for block in config.blocks:
            blocks.append(Bottleneck(channels, block))
            channels = block.channels
        self.blocks = nn.Sequential(*blocks)
        self.tail = ConvNorm(channels, config.tail, act="hardswish")
        self.head = Head(config.tail, config.hidden, config.num_classes, config.dropout)
        if config.ach:
            named = {f"blocks.{index}": cs for index, cs in config.ach.cs.items()}
            put_ach(self, named, config.ach.norm, config.slot_order)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.tail(self.blocks(self.stem(x))))
        return out


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    elif isinstance(module, nn.Linear):
        nn.init.xavier_normal_(module.weight)
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _block(k: int, expanded: int, channels: int, gated: bool, act: Activation, s: int = 1) -> BottleneckConfig:
    return BottleneckConfig(k=k, expanded=expanded, channels=channels, gated=gated, act=act, s=s)


_SMALL = MobileNetV3Config(
    name="mobilenet_v3_small",
    blocks=(
        _block(3, 16, 16, True, "relu", 2),
        _block(3, 72, 24, False, "relu", 2),
        _block(3, 88, 24, False, "relu"),
        _block(5, 96, 40, True, "hardswish", 2),
        _block(5, 240, 40, True, "hardswish"),
        _block(5, 240, 40, True, "hardswish"),
        _block(5, 120, 48, True, "hardswish"),
        _block(5, 144, 48, True, "hardswish"),
        _block(5, 288, 96, True, "hardswish", 2),
        _block(5, 576, 96, True, "hardswish"),
        _block(5, 576, 96, True, "hardswish"),
    ),
)
# Every kind of block at a size that trains in seconds: for tests and first tries.
_NANO = MobileNetV3Config(
    name="mobilenet_v3_nano",
    stem=8,
    blocks=(
        _block(3, 8, 8, True, "relu", 2),
        _block(3, 24, 16, False, "relu", 2),
        _block(5, 32, 16, True, "hardswish"),
    ),
    tail=48,
    hidden=48,
)
# ACH where a block of stride 1 widens, as wide as it was: within 6 %.
_SMALL_ACH = _SMALL.model_copy(
    update={"name": "mobilenet_v3_small_ach", "ach": ACHExpansion(cs={4: 20, 5: 20, 7: 14, 9: 31, 10: 31})}
)
VARIANTS = {config.name: config for config in (_NANO, _SMALL, _SMALL_ACH)}
FAMILY = Family(MobileNetV3Config, MobileNetV3, VARIANTS)
