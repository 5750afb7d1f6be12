"""Networks as plain data: their families and variants by name, what all configurations share, and Hadaptive-Net's.

Source of Hadaptive-Net: arXiv 2505.22226v2 ("Expressive yet Efficient Feature Expansion with Adaptive Cross-Hadamard
Products"). Kept free of torch, so that recipes and ``--help`` can name models without loading it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator

from hadaptive_q.errors import UserError

Norm = Literal["dysoft", "batch_norm"]
SlotOrder = Literal["rank", "channel"]
# What a file takes: normalised images NCHW, or the bytes of an image, NHWC or NCHW.
InputName = Literal["float32", "uint8", "uint8_nchw"]
INPUTS: tuple[InputName, ...] = get_args(InputName)
# A family is a module beside this one, which holds all there is to it; here stand the names that need no torch.
FAMILIES = {
    "hadaptive_net": ("nano", "s", "m", "l"),
    "mobilenet_v3": ("nano", "small", "small_ach"),
    "rcvit": ("nano", "xs", "s", "m", "t"),
    "starnet": ("nano", "s1", "s2", "s3", "s4"),
}
# The variants by name, and the family of each.
MODELS = {f"{family}_{variant}": family for family, variants in FAMILIES.items() for variant in variants}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NetworkConfig(_Frozen, ABC):
    """Everything that decides the shape of a network, and nothing else; `family` is the key of its family."""

    family: str
    name: str
    num_classes: PositiveInt = 100

    @property
    @abstractmethod
    def stride(self) -> int:
        """Input pixels per output pixel of the last stage: the smallest image the network takes."""

    @property
    @abstractmethod
    def stages(self) -> Sequence[BaseModel]:
        """The stages or blocks of the network, in the order of the data."""

    @property
    def selects(self) -> bool:
        """Whether the network has selections of channels."""
        return False

    def with_ach(self, cs: Mapping[str, int], norm: Norm, slot_order: SlotOrder) -> NetworkConfig:
        """Return the configuration once the modules named in `cs` expand by ACH that chooses so many channels.

        Raises UserError where this family has no place for it.
        """
        raise UserError(f"replace_expansion of {self.name}", f"the family {self.family}", "one with plain expansions")


class StageConfig(_Frozen):
    """A stage of blocks that keep the size: `depth` of them with `channels` each."""

    channels: PositiveInt
    depth: PositiveInt


class ConvConfig(_Frozen):
    """Convolution + BatchNorm (+ Hardswish): kernel `k`, stride `s`, no padding (`k == s`)."""

    channels: PositiveInt
    k: PositiveInt
    s: PositiveInt
    act: bool = True


class GhostConfig(_Frozen):
    """Bottleneck whose expansion is Ghost: `ce = int(c1 * ratio)` channels."""

    expansion: Literal["ghost"] = "ghost"
    channels: PositiveInt
    ratio: PositiveFloat
    k: PositiveInt
    s: PositiveInt = 1


class ACHConfig(_Frozen):
    """Bottleneck whose expansion is ACH: `ce = c1 + cs (cs - 1) / 2` channels."""

    expansion: Literal["ach"] = "ach"
    channels: PositiveInt
    cs: int
    k: PositiveInt
    s: PositiveInt = 1
    norm: Norm = "dysoft"

    @field_validator("cs")
    @classmethod
    def _at_least_two(cls, cs: int) -> int:
        if cs < 2:
            raise ValueError("a product needs two channels: cs >= 2")
        return cs


BlockConfig = GhostConfig | ACHConfig


class HadaptiveNetConfig(NetworkConfig):
    """The shape of a Hadaptive-Net."""

    family: Literal["hadaptive_net"] = "hadaptive_net"
    stem: tuple[ConvConfig, ...]
    blocks: tuple[Annotated[BlockConfig, Field(discriminator="expansion")], ...]
    tail: PositiveInt = 960
    hidden: PositiveInt = 1280
    dropout: float = 0.3
    slot_order: SlotOrder = "rank"

    @property
    def stride(self) -> int:
        return math.prod(part.s for part in (*self.stem, *self.blocks))

    @property
    def stages(self) -> Sequence[BaseModel]:
        return self.blocks

    @property
    def selects(self) -> bool:
        return any(isinstance(block, ACHConfig) for block in self.blocks)


def _stem(first: int, second: int, third: int) -> tuple[ConvConfig, ...]:
    return (
        ConvConfig(channels=first, k=2, s=2, act=False),
        ConvConfig(channels=second, k=2, s=2),
        ConvConfig(channels=third, k=1, s=1),
    )


def _ghost(channels: int, ratio: float, k: int = 3, s: int = 1) -> GhostConfig:
    return GhostConfig(channels=channels, ratio=ratio, k=2 if s == 2 else k, s=s)


def _ach(channels: int, cs: int, k: int, norm: Norm = "dysoft") -> ACHConfig:
    return ACHConfig(channels=channels, cs=cs, k=k, norm=norm)


def _s() -> HadaptiveNetConfig:
    h16, h32 = _ach(96, 16, 5), _ach(128, 32, 7)
    return HadaptiveNetConfig(
        name="hadaptive_net_s",
        stem=_stem(32, 48, 32),
        blocks=(
            *(_ghost(64, 4, s=2), _ghost(64, 2, k=3)),
            *(_ghost(96, 4, s=2), h16, h16, _ghost(96, 2, k=5), h16, h16),
            *(_ghost(128, 6, s=2), h32, h32),
        ),
    )


def _m() -> HadaptiveNetConfig:
    pair = (_ach(128, 24, 5), _ach(128, 24, 5, "batch_norm"))
    return HadaptiveNetConfig(
        name="hadaptive_net_m",
        stem=_stem(32, 128, 48),
        blocks=(
            *(_ghost(80, 4, s=2), _ghost(80, 2, k=3)),
            *(_ghost(128, 6, s=2), *pair, _ghost(128, 4, k=5), *pair, _ghost(128, 4, k=5), *pair),
            *(_ghost(192, 6, s=2), _ach(192, 36, 7), _ach(192, 36, 7, "batch_norm")),
        ),
    )


def _l() -> HadaptiveNetConfig:
    pair = (_ach(192, 32, 5), _ach(192, 32, 5, "batch_norm"))
    last = (_ach(256, 36, 7), _ach(256, 36, 7, "batch_norm"))
    return HadaptiveNetConfig(
        name="hadaptive_net_l",
        stem=_stem(24, 96, 48),
        blocks=(
            *(_ghost(96, 4, s=2), _ghost(96, 4, k=3)),
            *(_ghost(192, 4, s=2), *(*pair, _ghost(192, 4, k=5)) * 3, *pair),
            *(_ghost(256, 4, s=2), *last),
            *(_ghost(256, 4, s=2), *last),
        ),
    )


def _nano() -> HadaptiveNetConfig:
    """Every kind of block at a size that trains in seconds: for tests and first tries."""
    return HadaptiveNetConfig(
        name="hadaptive_net_nano",
        stem=_stem(8, 12, 8),
        blocks=(
            *(_ghost(16, 4, s=2), _ghost(16, 2, k=3)),
            *(_ach(16, 6, 5), _ach(16, 6, 5, "batch_norm")),
            *(_ghost(24, 6, s=2), _ach(24, 8, 7)),
        ),
        tail=40,
        hidden=48,
    )


VARIANTS: dict[str, HadaptiveNetConfig] = {c.name: c for c in (_nano(), _s(), _m(), _l())}


class Preprocess(_Frozen):
    """How an image becomes the network's input; travels with every checkpoint and `.pte`.

    Input ``x = (pixel / 255 - mean) / std``, RGB: the square in the middle of the upright image, its side `crop` times
    the image's shorter side, resized to `image_size` x `image_size`.
    """

    image_size: PositiveInt
    mean: tuple[float, float, float]
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
    classes: tuple[str, ...]
    # Left out where it is 1: digests of what was written before there was such a field stay what they are.
    crop: Annotated[float, Field(gt=0, le=1, exclude_if=lambda crop: crop == 1)] = 1.0

    @property
    def unnormalised(self) -> Preprocess:
        """The same images as ``x = pixel / 255``."""
        return self.model_copy(update={"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)})
