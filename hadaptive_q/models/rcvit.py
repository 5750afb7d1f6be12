"""CAS-ViT: convolutional additive self-attention, gates on query and key, and their sum's product with the value.

Source: arXiv 2408.03703 ("CAS-ViT: Convolutional Additive Self-attention Vision Transformers for Efficient Mobile
Applications"); RCViT is the authors' name of the networks. The parameter counts they state are those with two heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt
from torch import Tensor, nn

from hadaptive_q.models import rcvit_layout
from hadaptive_q.models.batch_random import StochasticDepth
from hadaptive_q.models.blocks import Convolution
from hadaptive_q.models.config import NetworkConfig, StageConfig
from hadaptive_q.models.network import Family, Layout, Network


class RCViTConfig(NetworkConfig):
    """Stage `i` has `widths[i]` channels and `depths[i]` blocks, whose MLPs have `ratio` times as many.

    With two `heads` the logits are the mean of both. Of n blocks, block i leaves out its mixer or its MLP with
    probability ``drop_path i / (n - 1)`` while training.
    """

    family: Literal["rcvit"] = "rcvit"
    widths: tuple[PositiveInt, ...]
    depths: tuple[PositiveInt, ...]
    ratio: PositiveInt = 4
    heads: Literal[1, 2] = 1
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @property
    def stride(self) -> int:
        return 2 << len(self.widths)

    @property
    def stages(self) -> Sequence[StageConfig]:
        return [StageConfig(channels=width, depth=depth) for width, depth in zip(self.widths, self.depths, strict=True)]


class Local(nn.Sequential):
    """``W2 gelu(dw3x3(BN(W1 x)))``: `(B, C, H, W) -> (B, C, H, W)`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = Convolution(channels, channels)
        self.depthwise = Convolution(channels, channels, 3, groups=channels, norm=False)
        self.act = nn.GELU()
        self.expand = Convolution(channels, channels, norm=False)


class SpatialGate(nn.Module):
    """``x * sigmoid(w relu(BN(dw3x3(x))))``, one factor per pixel: `(B, C, H, W) -> (B, C, H, W)`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = Convolution(channels, channels, 3, groups=channels)
        self.act = nn.ReLU()
        self.mix = nn.Conv2d(channels, 1, 1, bias=False)
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x * self.gate(self.mix(self.act(self.depthwise(x))))
        return out


class ChannelGate(nn.Module):
    """``x * sigmoid(W mean_hw(x))``, one factor per channel: `(B, C, H, W) -> (B, C, H, W)`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(channels, channels, 1, bias=False)
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        # Kept dimensions and (-1, -2) in this order: the form of the mean that XNNPACK takes.
        out: Tensor = x * self.gate(self.mix(x.mean((-1, -2), keepdim=True)))
        return out


class Mixer(nn.Module):
    """Additive attention: ``P(G(phi_q(q) + phi_k(k)) * v)``, where G and P are 3x3 depthwise convolutions.

    `phi` gates pixels, then channels. Shapes: `(B, C, H, W) -> (B, C, H, W)`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.query = nn.Sequential(SpatialGate(channels), ChannelGate(channels))
        self.key = nn.Sequential(SpatialGate(channels), ChannelGate(channels))
        self.context = Convolution(channels, channels, 3, groups=channels, norm=False)
        self.projection = Convolution(channels, channels, 3, groups=channels, norm=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=1)
        out: Tensor = self.projection(self.context(self.query(query) + self.key(key)) * value)
        return out


class MLP(nn.Sequential):
    """``W2 gelu(W1 x)`` on every pixel: `(B, C, H, W) -> (B, C, H, W)`."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        self.expand = Convolution(channels, ratio * channels, norm=False)
        self.act = nn.GELU()
        self.reduce = Convolution(ratio * channels, channels, norm=False)


class Block(nn.Module):
    """Three residual steps, local, mixer and MLP: `(B, C, H, W) -> (B, C, H, W)`."""

    def __init__(self, channels: int, ratio: int, drop_path: float) -> None:
        super().__init__()
        self.local = Local(channels)
        self.norm1 = nn.BatchNorm2d(channels)
        self.mixer = Mixer(channels)
        self.norm2 = nn.BatchNorm2d(channels)
        self.mlp = MLP(channels, ratio)
        self.drop_path = StochasticDepth(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.local(x)
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return out


class Head(nn.Module):
    """BatchNorm, global average pool, and the mean of one or two Linears: `(B, C, H, W) -> (B, classes)`."""

    def __init__(self, channels: int, classes: int, heads: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, classes)
        self.distilled = nn.Linear(channels, classes) if heads == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        # Kept dimensions and (-1, -2) in this order: the form of the mean that XNNPACK takes.
        x = self.bn(x).mean((-1, -2), keepdim=True).flatten(1)
        out: Tensor = self.classifier(x)
        return out if self.distilled is None else (out + self.distilled(x)) / 2


class RCViT(Network):
    """The float network; what comes down a size counts as a block, too."""

    config: RCViTConfig

    def __init__(self, config: RCViTConfig) -> None:
        super().__init__(config)
        first, *_ = config.widths
        self.stem = nn.Sequential(
            *(Convolution(3, first // 2, 3, 2), nn.ReLU()), *(Convolution(first // 2, first, 3, 2), nn.ReLU())
        )
        blocks, total = list[nn.Module](), sum(config.depths)
        channels, done = first, 0
        for stage in config.stages:
            if blocks:
                blocks.append(Convolution(channels, stage.channels, 3, 2))
            channels = stage.channels
            for index in range(done, done + stage.depth):
                blocks.append(Block(channels, config.ratio, config.drop_path * index / max(1, total - 1)))
            done += stage.depth
        self.blocks = nn.Sequential(*blocks)
        self.head = Head(channels, config.num_classes, config.heads)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.stem(x)))
        return out


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def _read(content: Mapping[str, Any], where: str) -> tuple[RCViTConfig, dict[str, Tensor]]:
    fields, tensors = rcvit_layout.read(content, where)
    shape = RCViTConfig(name="rcvit", **fields)
    # The name of the variant that it is.
    same = (c for c in VARIANTS.values() if (c.widths, c.depths, c.ratio) == (shape.widths, shape.depths, shape.ratio))
    variant = next(same, shape)
    return shape.model_copy(update={"name": variant.name}), tensors


VARIANTS = {
    config.name: config
    for config in (
        # Every kind of layer at a size that trains in seconds: for tests and first tries.
        RCViTConfig(name="rcvit_nano", widths=(12, 16), depths=(1, 1)),
        RCViTConfig(name="rcvit_xs", widths=(48, 56, 112, 220), depths=(2, 2, 4, 2)),
        RCViTConfig(name="rcvit_s", widths=(48, 64, 128, 256), depths=(3, 3, 6, 3)),
        RCViTConfig(name="rcvit_m", widths=(64, 96, 192, 384), depths=(3, 3, 6, 3)),
        RCViTConfig(name="rcvit_t", widths=(96, 128, 256, 512), depths=(3, 3, 6, 3)),
    )
}
FAMILY = Family(RCViTConfig, RCViT, VARIANTS, Layout("a dict with 'model'", rcvit_layout.fits, _read))
