"""From uint8 batches to network inputs: augmentation in training, normalisation always."""

from __future__ import annotations

import kornia.augmentation as K
import torch
from kornia.augmentation.auto import RandAugment
from kornia.augmentation.container.params import ParamItem
from torch import Tensor, nn

from hadaptive_q import processes
from hadaptive_q.models.config import Preprocess
from hadaptive_q.recipe import AugmentConfig

RANDAUGMENT_OPERATIONS = 2
# Kornia draws the operations once for all images it is given.
GROUP = 16


def normalise(images: Tensor, preprocess: Preprocess) -> Tensor:
    """Return ``(pixel / 255 - mean) / std``, float32 and contiguous NCHW, of uint8 `(B, 3, S, S)`.

    Contiguous whatever the strides of `images`: an example input in channels-last strides would be lowered to a
    file that expects NHWC and answers garbage to everyone else, without an error.
    """
    mean = torch.tensor(preprocess.mean, device=images.device)[:, None, None]
    std = torch.tensor(preprocess.std, device=images.device)[:, None, None]
    return ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.contiguous_format)


class Augment(nn.Module):
    """Augment and normalise a uint8 batch; random numbers come from torch's global generator.

    Processes that share a batch draw for the whole of it, and each applies what was drawn for its own images.
    """

    def __init__(self, config: AugmentConfig, preprocess: Preprocess, mirror: bool) -> None:
        super().__init__()
        self.preprocess = preprocess
        steps: list[nn.Module] = []
        if config.degrees or config.translate or config.scale:
            steps.append(
                K.RandomAffine(
                    degrees=config.degrees,
                    translate=(config.translate, config.translate),
                    scale=(1 - config.scale, 1 + config.scale),
                    padding_mode="border",
                    p=1.0,
                )
            )
        if config.mirror and mirror:
            steps.append(K.RandomHorizontalFlip())
        self.random = bool(steps)
        self.steps = K.AugmentationSequential(*steps, data_keys=["input"])
        self.policy = RandAugment(n=RANDAUGMENT_OPERATIONS, m=config.randaugment) if config.randaugment else None

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        pixels = images.float() / 255
        augmented = self.steps(pixels, params=self._drawn(pixels)) if self.random else pixels
        if self.policy:
            augmented = torch.cat([self.policy(part) for part in augmented.split(GROUP)]).clamp(0, 1)
        return normalise(augmented * 255, self.preprocess)

    def _drawn(self, pixels: Tensor) -> list[ParamItem]:
        whole = torch.Size((processes.count() * len(pixels), *pixels.shape[1:]))
        items: list[ParamItem] = self.steps.forward_parameters(whole)
        for item in items:
            assert isinstance(item.data, dict)
            for name, values in item.data.items():
                if name != "forward_input_shape":
                    item.data[name] = processes.own_rows(values)
        return items
