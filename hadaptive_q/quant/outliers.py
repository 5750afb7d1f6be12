"""Calibration images that no range should cover.

Products of products have no bound: behind four BatchNorm-type ACH modules, two calibration images of 512 reached
activations four orders of magnitude beyond the others', and ranges that cover them leave the others a code or two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

USUAL = 0.9
# A range that covers it would leave the others less than four of their eight bits.
LIMIT = 16.0


@torch.no_grad()
def drop_outliers(
    graph: Callable[[Tensor], object], watched: Iterable[nn.Module], batches: Sequence[Tensor]
) -> list[Tensor]:
    """Return `batches` of network inputs without their outliers; batches without any are the very same.

    An image is an outlier where some tensor that a module of `watched` reads has a root mean square of more than
    `LIMIT` times that which nine of ten images stay within.
    """
    seen: list[Tensor] = []

    def watch(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].float().flatten(1).square().mean(dim=1).sqrt().cpu())

    hooks = [module.register_forward_pre_hook(watch) for module in watched]
    try:
        sizes = torch.cat([_sizes(graph, inputs, seen) for inputs in batches], dim=1)
    finally:
        for hook in hooks:
            hook.remove()
    usual = sizes.quantile(USUAL, dim=1, keepdim=True)
    # A tensor that is zero for nearly all images says nothing.
    beyond = ((sizes > LIMIT * usual) & (usual > 0)).any(dim=0)
    # NaN and infinity are an error, which the observers report, not an outlier.
    outlier = beyond & sizes.isfinite().all(dim=0)
    kept = [inputs[~mask] if mask.any() else inputs for inputs, mask in _pairs(batches, outlier)]
    return [inputs for inputs in kept if len(inputs)]


def _sizes(graph: Callable[[Tensor], object], inputs: Tensor, seen: list[Tensor]) -> Tensor:
    """Return the root mean square of every watched tensor `(T, B)`."""
    seen.clear()
    graph(inputs)
    return torch.stack(seen)


def _pairs(batches: Sequence[Tensor], outlier: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    return zip(batches, outlier.split([len(inputs) for inputs in batches]), strict=True)
