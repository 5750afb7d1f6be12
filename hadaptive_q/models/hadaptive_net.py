"""Hadaptive-Net: stem, bottlenecks with Ghost and ACH expansion, tail, classifier.

Source: arXiv 2505.22226v2. Variants live in `config.VARIANTS`.
"""

from __future__ import annotations

from torch import Tensor, nn

from hadaptive_q.models import conductor
from hadaptive_q.models.blocks import Bottleneck, ConvBN, Head
from hadaptive_q.models.config import VARIANTS, HadaptiveNetConfig
from hadaptive_q.models.network import Family, Layout, Network


class HadaptiveNet(Network):
    """The float network: normalised images `(B, 3, H, W)` to logits `(B, num_classes)`.

    H and W must be at least `config.stride`. `preprocess` says how images become inputs, once data decided it.
    """

    config: HadaptiveNetConfig

    def __init__(self, config: HadaptiveNetConfig) -> None:
        super().__init__(config)
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


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_normal_(module.weight)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


LAYOUT = Layout("a dict with 'model_desc' and 'model_state_dict'", conductor.fits, conductor.read)
FAMILY = Family(HadaptiveNetConfig, HadaptiveNet, VARIANTS, LAYOUT)
