"""What networks of all families have in common, and what a family is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hadaptive_q.models.ach import ACH
from hadaptive_q.models.config import NetworkConfig, Preprocess


class Network(nn.Module):
    """A float network: normalised images `(B, 3, H, W)` to logits `(B, num_classes)`.

    Its first part is `stem`, whose first convolution reads the image and has a BatchNorm behind it; what fine-tuning
    compares with the float network is what each of `blocks` puts out. H and W must be at least `config.stride`.
    `preprocess` says how images become inputs, once data decided it.
    """

    stem: nn.Sequential
    blocks: nn.Sequential

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.preprocess: Preprocess | None = None

    def ach_modules(self) -> Iterator[tuple[str, ACH]]:
        """Yield `(name, module)` of every ACH, in the order of the data."""
        for name, module in self.named_modules():
            if isinstance(module, ACH):
                yield name, module


@dataclass(frozen=True)
class Layout:
    """How the authors of a family store a network: `read` turns what is in a file into a configuration and tensors.

    `read` takes what `fits` takes, and where it came from; `expected` says in an error what `fits` looks for.
    """

    expected: str
    fits: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Mapping[str, Any], str], tuple[NetworkConfig, dict[str, Tensor]]]


@dataclass(frozen=True)
class Family:
    """The configuration and the network of a family, its variants by name, and its authors' layout of a file."""

    config: type[NetworkConfig]
    network: Callable[[Any], Network]
    variants: Mapping[str, NetworkConfig]
    layout: Layout | None = None


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
