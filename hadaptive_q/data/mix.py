"""Pairs of training images in one: blended, or a rectangle of one in the other, with the labels in the same shares.

Sources: mixup, Zhang et al., arXiv 1710.09412; CutMix, Yun et al., arXiv 1905.04899.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hadaptive_q.recipe import AugmentConfig


class Mix:
    """Mix a batch with itself in another order; random numbers come from torch's global generator.

    With both `mixup` and `cutmix`, either does every batch with the same chance; without, nothing changes.
    """

    def __init__(self, config: AugmentConfig, num_classes: int) -> None:
        self.mixup, self.cutmix, self.num_classes = config.mixup, config.cutmix, num_classes

    @torch.no_grad()
    def __call__(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mixed `inputs` `(B, 3, S, S)`, and for `labels` `(B,)` the classes' shares `(B, classes)`."""
        if not (self.mixup or self.cutmix):
            return inputs, labels
        cuts = bool(self.cutmix) and (not self.mixup or bool(torch.rand(()) < 0.5))
        strength = torch.tensor(self.cutmix if cuts else self.mixup)
        kept = float(torch.distributions.Beta(strength, strength).sample())
        partner = torch.randperm(len(inputs)).to(inputs.device)
        if cuts:
            inputs, kept = _pasted(inputs, inputs[partner], kept)
        else:
            inputs = inputs.lerp(inputs[partner], 1 - kept)
        shares = F.one_hot(labels, self.num_classes).float()
        return inputs, shares.lerp(shares[partner], 1 - kept)


def _pasted(inputs: Tensor, others: Tensor, kept: float) -> tuple[Tensor, float]:
    """Return `inputs` with a rectangle of `others` about ``1 - kept`` of their area, and the share that was kept."""
    height, width = inputs.shape[2:]
    half_y, half_x = (math.sqrt(1 - kept) * side / 2 for side in (height, width))
    y, x = (torch.rand(2) * torch.tensor([height, width])).tolist()
    top, bottom = max(0, round(y - half_y)), min(height, round(y + half_y))
    left, right = max(0, round(x - half_x)), min(width, round(x + half_x))
    pasted = inputs.clone()
    pasted[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
    return pasted, 1 - (bottom - top) * (right - left) / (height * width)
