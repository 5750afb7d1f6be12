"""S2AFormer-style networks: depthwise and strip attention, local convolutions and MLPs in one block.

Source: arXiv 2505.22195 ("S2AFormer"), of which no code is public. Published are the order of the parts (stem of three
3x3 convolutions, the first with stride 2; per stage a patch embedding and hybrid blocks; the four steps of a block and
its three LayerNorms), that a depthwise convolution reduces the pixels of keys and values, that queries and keys have
far fewer channels than values, and per variant the parameters and multiply-accumulates. Chosen here is all else: every
field of the configuration below and its default, BatchNorm behind the convolutions of stem, patch embeddings, reduction
and local step, the 1x1 convolutions around the attention, no scale or position in it but ``1 / sqrt(channels)``, what
the local step consists of, the head and the initial weights. Widths and depths meet the published counts: parameters
within 2 %, multiply-accumulates within 4 %, those of the products inside the attention included or not. Weights of the
authors would not fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from hadaptive_q.models.blocks import Convolution, NormHead
from hadaptive_q.models.config import NetworkConfig, StageConfig
from hadaptive_q.models.network import Family, Network

Activation = Literal["gelu", "hardswish", "relu"]
ACTIVATIONS: dict[Activation, type[nn.Module]] = {"gelu": nn.GELU, "hardswish": nn.Hardswish, "relu": nn.ReLU}


class HybridConfig(StageConfig):
    """A patch embedding of stride 2 and the blocks behind it.

    Keys and values have `reduction` times fewer pixels in each direction; `heads` attend on their own.
    """

    reduction: PositiveInt = 1
    heads: PositiveInt = 1


class S2AFormerConfig(NetworkConfig):
    """The shape of an S2AFormer; `k` are kernels: of patch embeddings, of a block's first step, of its local step.

    Queries and keys have `key` channels in each head; the MLP has `ratio` times as many channels as its stage. `act` is
    the activation of stem, local step and MLP, `epsilon` and `shifted` say of LayerNorms what keeps their root from 0
    and whether they add a bias (every layer behind one has its own), `biased` whether convolutions without norm do.
    """

    family: Literal["s2aformer"] = "s2aformer"
    stem: PositiveInt = 16
    levels: tuple[HybridConfig, ...]
    patch_k: PositiveInt = 3
    first_k: PositiveInt = 3
    local_k: PositiveInt = 3
    key: PositiveInt = 16
    ratio: PositiveFloat = 4
    act: Activation = "gelu"
    epsilon: PositiveFloat = 1e-5
    shifted: bool = False
    biased: bool = True

    @property
    def stride(self) -> int:
        return 2 << len(self.levels)

    @property
    def stages(self) -> Sequence[HybridConfig]:
        return self.levels


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of every pixel: `(B, C, H, W) -> (B, C, H, W)`."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class StripAttention(nn.Module):
    """``P softmax(Q K^T / sqrt(key)) V``: narrow queries and keys, keys and values of a reduced map.

    Shapes: `(B, C, H, W) -> (B, C, H, W)`; per head `Q` is `(H W, key)`, `K` is `(H W / r^2, key)`.
    """

    def __init__(self, channels: int, config: S2AFormerConfig, stage: HybridConfig) -> None:
        super().__init__()
        r, narrow = stage.reduction, stage.heads * config.key
        self.heads, self.scale = stage.heads, 1 / math.sqrt(config.key)
        self.reduce: nn.Module = nn.Identity()
        if r > 1:
            reduce = nn.Conv2d(channels, channels, r, r, groups=channels, bias=False)
            self.reduce = nn.Sequential(reduce, nn.BatchNorm2d(channels))
        self.query = nn.Conv2d(channels, narrow, 1, bias=config.biased)
        self.key = nn.Conv2d(channels, narrow, 1, bias=config.biased)
        self.value = nn.Conv2d(channels, channels, 1, bias=config.biased)
        self.projection = nn.Conv2d(channels, channels, 1, bias=config.biased)

    def forward(self, x: Tensor) -> Tensor:
        reduced = self.reduce(x)
        query, key, value = self._rows(self.query(x)), self._rows(self.key(reduced)), self._rows(self.value(reduced))
        weights = functional.softmax(torch.bmm(query, key.transpose(1, 2) * self.scale), -1)
        rows = torch.bmm(weights, value)
        if self.heads > 1:
            rows = rows.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2)
        out: Tensor = self.projection(rows.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2))
        return out

    def _rows(self, x: Tensor) -> Tensor:
        """Return the pixels of `x` as rows of every head: `(B, heads D, H, W) -> (B heads, H W, D)`."""
        # Channels last, as the runtime stores them: with one head nothing moves.
        rows = x.permute(0, 2, 3, 1).flatten(1, 2)
        if self.heads > 1:
            rows = rows.unflatten(2, (self.heads, -1)).transpose(1, 2).flatten(0, 1)
        return rows


class HybridBlock(nn.Module):
    """Four residual steps: depthwise convolution, strip attention, local step, MLP; a LayerNorm before the last three.

    Shapes: `(B, C, H, W) -> (B, C, H, W)`.
    """

    def __init__(self, config: S2AFormerConfig, stage: HybridConfig) -> None:
        super().__init__()
        channels, act = stage.channels, ACTIVATIONS[config.act]
        wide, biased = int(config.ratio * channels), config.biased

        def norm() -> ChannelNorm:
            return ChannelNorm(channels, config.epsilon, bias=config.shifted)

        def depthwise(k: int, bias: bool) -> nn.Conv2d:
            return nn.Conv2d(channels, channels, k, padding=k // 2, groups=channels, bias=bias)

        self.first = depthwise(config.first_k, biased)
        self.attention_norm = norm()
        self.attention = StripAttention(channels, config, stage)
        self.local_norm = norm()
        self.local = nn.Sequential(
            depthwise(config.local_k, bias=False), nn.BatchNorm2d(channels), act(), depthwise(config.local_k, biased)
        )
        self.mlp_norm = norm()
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=biased), act(), nn.Conv2d(wide, channels, 1, bias=biased)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) + x
        x = self.attention(self.attention_norm(x)) + x
        x = self.local(self.local_norm(x)) + x
        out: Tensor = self.mlp(self.mlp_norm(x)) + x
        return out


class S2AFormer(Network):
    """The float network; patch embeddings count as blocks, too."""

    config: S2AFormerConfig

    def __init__(self, config: S2AFormerConfig) -> None:
        super().__init__(config)
        act, stem = ACTIVATIONS[config.act], list[nn.Module]()
        for c1, s in ((3, 2), (config.stem, 1), (config.stem, 1)):
            stem += [Convolution(c1, config.stem, 3, s), act()]
        self.stem = nn.Sequential(*stem)
        channels, blocks = config.stem, list[nn.Module]()
        for stage in config.levels:
            blocks.append(Convolution(channels, stage.channels, config.patch_k, 2))
            channels = stage.channels
            blocks += [HybridBlock(config, stage) for _ in range(stage.depth)]
        self.blocks = nn.Sequential(*blocks)
        self.head = NormHead(channels, config.num_classes)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.stem(x)))
        return out


def _initialise(module: nn.Module) -> None:
    # What mixes channels as in a transformer; convolutions with more taps begin as they come.
    if isinstance(module, nn.Conv2d | nn.Linear) and module.weight[0, 0].numel() == 1:
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _variant(name: str, stem: int, *stages: tuple[int, int, int], key: int = 16) -> S2AFormerConfig:
    levels = tuple(HybridConfig(channels=channels, depth=depth, reduction=r) for channels, depth, r in stages)
    return S2AFormerConfig(name=f"s2aformer_{name}", stem=stem, levels=levels, key=key)


VARIANTS = {
    config.name: config
    for config in (
        # Two stages at a size that trains in seconds: for tests and first tries.
        _variant("nano", 8, (16, 1, 2), (24, 1, 1), key=4),
        _variant("mini", 8, (24, 1, 8), (48, 2, 4), (112, 6, 2), (288, 4, 1)),
        _variant("t", 16, (32, 2, 8), (64, 3, 4), (144, 4, 2), (352, 3, 1)),
        _variant("xs", 16, (32, 3, 8), (64, 3, 4), (144, 6, 2), (320, 4, 1)),
        _variant("s", 16, (40, 3, 8), (80, 4, 4), (192, 8, 2), (384, 4, 1)),
        _variant("m", 16, (72, 2, 8), (144, 3, 4), (320, 14, 2), (480, 3, 1)),
    )
}
FAMILY = Family(S2AFormerConfig, S2AFormer, VARIANTS)
