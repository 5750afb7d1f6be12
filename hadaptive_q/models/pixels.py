"""Fold the normalisation of images into the network's first convolution.

Formula: with ``x = (p - mean) / std`` for pixels `p` in [0, 1], ``W * x = W' * p - d`` where ``W'_oc = W_oc / std_c``
and ``d_o = sum W_oc mean_c / std_c`` over channels and taps. BatchNorm behind it takes `d` into its running mean.
Exact to rounding because the convolution pads nothing. Pixels in [0, 1] and not bytes in [0, 255]: weights keep their
size, and AdamW's steps, which do not follow the size of a weight, their effect in the fine-tuning.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from hadaptive_q.models.blocks import ConvBN
from hadaptive_q.models.config import Preprocess
from hadaptive_q.models.hadaptive_net import HadaptiveNet


@torch.no_grad()
def take_pixels(model: HadaptiveNet, preprocess: Preprocess) -> HadaptiveNet:
    """Return a copy that makes of ``pixel / 255`` what `model` makes of the image normalised by `preprocess`.

    Raises ValueError where the first convolution pads or has a bias.
    """
    folded = copy.deepcopy(model)
    first = folded.stem[0]
    assert isinstance(first, ConvBN)
    conv, norm = first.conv, first.bn
    if conv.bias is not None or any(conv.padding) or conv.groups != 1:
        raise ValueError(f"the normalisation does not fold into {conv}")
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (preprocess.mean, preprocess.std))
    weight: Tensor = conv.weight.double() / std
    assert norm.running_mean is not None
    norm.running_mean.copy_(norm.running_mean.double() + (weight * mean).sum(dim=(1, 2, 3)))
    conv.weight.copy_(weight)
    folded.preprocess = preprocess.unnormalised
    return folded
