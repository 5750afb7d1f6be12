"""Hadaptive-Net: stem, bottlenecks with Ghost and ACH expansion, tail, classifier.

Source: arXiv 2505.22226v2. Variants live in `config.VARIANTS`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hadaptive_q.errors import UserError, nearest
from hadaptive_q.models.ach import ACH
from hadaptive_q.models.batch_random import Dropout
from hadaptive_q.models.blocks import Bottleneck, ConvBN
from hadaptive_q.models.config import VARIANTS, HadaptiveNetConfig, Preprocess


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


class HadaptiveNet(nn.Module):
    """The float network: normalised images `(B, 3, H, W)` to logits `(B, num_classes)`.

    H and W must be at least `config.stride`. `preprocess` says how images become inputs, once data decided it.
    """

    def __init__(self, config: HadaptiveNetConfig) -> None:
        super().__init__()
        self.config = config
        self.preprocess: Preprocess | None = None
        channels, stem = 3, []
        for part in config.stem:
            stem.append(ConvBN(channels, part.channels, part.k, part.s, act=part.act))
            channels = part.channels
        self.stem = nn.Sequential(*stem)
        blocks = []
        for block in config.blocks:
            blocks.append(Bottleneck(channels, block, config.slot_order))
            channels = block.channels
        self.blocks = nn.Sequential(*blocks)
        self.tail = ConvBN(channels, config.tail)
        self.head = Head(config.tail, config.hidden, config.num_classes, config.dropout)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.tail(self.blocks(self.stem(x))))
        return out

    def ach_modules(self) -> Iterator[tuple[str, ACH]]:
        """Yield `(name, module)` of every ACH, in the order of the data."""
        for name, module in self.named_modules():
            if isinstance(module, ACH):
                yield name, module


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_normal_(module.weight)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def create_model(name: str, num_classes: int = 100, **overrides: object) -> HadaptiveNet:
    """Return a freshly initialised variant; `overrides` replace fields of its configuration.

    Raises UserError for an unknown name.
    """
    if name not in VARIANTS:
        raise UserError(f"model {name!r}", "an unknown name", f"one of {', '.join(VARIANTS)}", nearest(name, VARIANTS))
    fields = VARIANTS[name].model_dump() | {"num_classes": num_classes} | overrides
    return HadaptiveNet(HadaptiveNetConfig.model_validate(fields))


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def count_macs(model: nn.Module, image_size: int) -> int:
    """Return the multiply-accumulates of all convolutions and linears for one image (not FLOPs: half)."""
    device = next(model.parameters()).device
    image = torch.zeros(1, 3, image_size, image_size, device=device)
    training = model.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(image)
    model.train(training)
    return int(counter.get_total_flops()) // 2
