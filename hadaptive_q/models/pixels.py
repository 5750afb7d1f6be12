"""Fold the normalisation of images into the network's first convolution.

Formula: with ``x = (p - mean) / std`` for pixels `p` in [0, 1], ``W * x = W' * p - d`` where ``W'_oc = W_oc / std_c``
and ``d_o = sum W_oc mean_c / std_c`` over channels and taps. BatchNorm behind it takes `d` into its running mean.
Exact to rounding because the convolution pads nothing. Pixels in [0, 1] and not bytes in [0, 255]: weights keep their
size, and AdamW's steps, which do not follow the size of a weight, their effect in the fine-tuning.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from hadaptive_q.errors import UserError
from hadaptive_q.models.config import Preprocess
from hadaptive_q.models.network import Network


@torch.no_grad()
def take_pixels(model: Network, preprocess: Preprocess) -> Network:
    """Return a copy that makes of ``pixel / 255`` what `model` makes of the image normalised by `preprocess`.

    Raises UserError where the first convolution pads: what it pads with is no pixel.
    """
    folded = copy.deepcopy(model)
    conv = next(module for module in folded.stem.modules() if isinstance(module, nn.Conv2d))
    norm = next(module for module in folded.stem.modules() if isinstance(module, nn.BatchNorm2d))
    if conv.padding != (0, 0):
        raise UserError(
            "quantize.input",
            f"bytes for {model.config.name}, whose first convolution pads",
            "float32: its zeros are images of the mean, which no byte is",
        )
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (preprocess.mean, preprocess.std))
    weight: Tensor = conv.weight.double() / std
    assert norm.running_mean is not None
    norm.running_mean.copy_(norm.running_mean.double() + (weight * mean).sum(dim=(1, 2, 3)))
    conv.weight.copy_(weight)
    folded.preprocess = preprocess.unnormalised
    return folded
