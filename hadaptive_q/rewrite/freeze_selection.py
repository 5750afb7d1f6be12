"""Freeze ACH's per-sample selection to the channels that calibration votes for (``selection: static``).

A vote weighs ranks: the channel at rank r of a sample gets ``cs - r`` points; the `cs` channels with most points
are chosen, in rank order (most points first) or channel order, as the network was trained. Not float-equal:
this one changes the network, and the report says by how much.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hadaptive_q.models.ach import ACH, top_channels
from hadaptive_q.models.network import Network


@torch.no_grad()
def freeze_selection(model: Network, batches: Iterable[Tensor]) -> dict[str, list[int]]:
    """Freeze every ACH of `model` in place by the votes over `batches` of inputs; return the channels by name."""
    points: dict[str, Tensor] = {}
    hooks = [
        module.scorer.register_forward_hook(_counter(points, name, module)) for name, module in model.ach_modules()
    ]
    model.eval()
    for inputs in batches:
        model(inputs)
    for hook in hooks:
        hook.remove()
    chosen = {name: module.select(points[name][None])[0] for name, module in model.ach_modules()}
    for name, module in model.ach_modules():
        module.freeze(chosen[name])
    return {name: indices.tolist() for name, indices in chosen.items()}


def _counter(points: dict[str, Tensor], name: str, module: ACH):  # type: ignore[no-untyped-def]
    weights = torch.arange(module.cs, 0, -1, dtype=torch.float64)

    def count(_module: object, _inputs: object, scores: Tensor) -> None:
        ranks = top_channels(scores, module.cs)
        total = points.setdefault(name, torch.zeros(scores.shape[1], dtype=torch.float64))
        for votes in ranks:
            total[votes] += weights

    return count
