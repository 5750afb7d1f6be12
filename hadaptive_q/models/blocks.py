"""The blocks of Hadaptive-Net: convolution with norm, Ghost expansion, bottleneck, head; and what families share.

Source: arXiv 2505.22226v2; Ghost from arXiv 1911.11907.
"""

from __future__ import annotations

from torch import Tensor, cat, nn

from hadaptive_q.models.ach import ACH
from hadaptive_q.models.batch_random import Dropout
from hadaptive_q.models.config import ACHConfig, BlockConfig, SlotOrder


class ConvBN(nn.Module):
    """``act(BN(conv(x)))`` without convolution bias; Hardswish where `act` is set.

    Shapes: `(B, c1, H, W) -> (B, c2, (H + 2p - k) / s + 1, ...)`.
    """

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, p: int = 0, groups: int = 1, act: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, p, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(c2)
        self.act: nn.Module = nn.Hardswish() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.bn(self.conv(x)))
        return out


class Convolution(nn.Sequential):
    """Convolution with bias, padded to keep the size but for the stride `s`, and BatchNorm where `norm` is set.

    Shapes: `(B, c1, H, W) -> (B, c2, ceil(H / s), ceil(W / s))`.
    """

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, groups: int = 1, norm: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, (k - 1) // 2, groups=groups)
        if norm:
            self.bn = nn.BatchNorm2d(c2)


class Ghost(nn.Module):
    """Half of the channels by a 1x1 convolution, the other half by a cheap 3x3 depthwise one of those.

    Shapes: `(B, c1, H, W) -> (B, 2 ceil(ce / 2), H, W)`.
    """

    def __init__(self, c1: int, ce: int) -> None:
        super().__init__()
        half = (ce + 1) // 2
        self.primary = ConvBN(c1, half)
        self.cheap = ConvBN(half, half, k=3, p=1, groups=half, act=False)
        self.out_channels = 2 * half

    def forward(self, x: Tensor) -> Tensor:
        primary = self.primary(x)
        return cat((primary, self.cheap(primary)), dim=1)


class Bottleneck(nn.Module):
    """Expansion (ACH or Ghost), depthwise convolution with Hardswish, 1x1 projection, residual if it fits.

    With stride 2 the depthwise kernel is 2x2 without padding, whatever `k` says.
    Shapes: `(B, c1, H, W) -> (B, config.channels, H / s, W / s)`.
    """

    def __init__(self, c1: int, config: BlockConfig, slot_order: SlotOrder) -> None:
        super().__init__()
        self.expansion: ACH | Ghost
        if isinstance(config, ACHConfig):
            self.expansion = ACH(c1, config.cs, config.norm, slot_order)
        else:
            self.expansion = Ghost(c1, int(c1 * config.ratio))
        ce = self.expansion.out_channels
        k, p = (2, 0) if config.s == 2 else (config.k, (config.k - 1) // 2)
        self.depthwise = ConvBN(ce, ce, k, config.s, p, groups=ce)
        self.projection = ConvBN(ce, config.channels, act=False)
        self.residual = config.s == 1 and c1 == config.channels

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.projection(self.depthwise(self.expansion(x)))
        return out + x if self.residual else out


class Head(nn.Module):
    """Global average pool, Linear, Hardswish, dropout, Linear: `(B, C, H, W) -> (B, classes)`."""

    def __init__(self, channels: int, hidden: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels, hidden)
        self.act = nn.Hardswish()
        self.dropout = Dropout(dropout)
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        # Kept dimensions and (-1, -2) in this order: the form of the mean that XNNPACK takes.
        x = x.mean((-1, -2), keepdim=True).flatten(1)
        out: Tensor = self.classifier(self.dropout(self.act(self.hidden(x))))
        return out


class NormHead(nn.Module):
    """BatchNorm, global average pool, Linear: `(B, C, H, W) -> (B, classes)`."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        # Kept dimensions and (-1, -2) in this order: the form of the mean that XNNPACK takes.
        out: Tensor = self.classifier(self.bn(x).mean((-1, -2), keepdim=True).flatten(1))
        return out
