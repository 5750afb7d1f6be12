"""The margin of a selection: how far scores are from choosing otherwise, and the loss that widens it.

A trained network's neighbouring ranks are a hundredth of a score apart, and rounding moves scores by as much: the
quantized network would choose other channels than the float one. The loss makes room between them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hadaptive_q.models.ach import top_channels
from hadaptive_q.train.observe import Choice


def score_gaps(scores: Tensor, wanted: Tensor, choice: Choice) -> Tensor:
    """Return by how much `scores` (B, C) decide for the selection that the scores `wanted` (B, C) make; below 0: not.

    In rank order every gap from the first chosen to the first refused channel counts, ``xi_(r) - xi_(r+1)`` in the
    order of `wanted`, `(B, cs)`. In channel order ranks do not matter, but the line t between chosen and refused does:
    ``2 (xi_c - t)`` for chosen and ``2 (t - xi_c)`` for refused channels, `(B, C)`, with t halfway between the least
    chosen and the largest refused score; the gap between these two is there twice.
    Where every channel is chosen none is refused, and that gap or line is missing.
    """
    cs, channels = choice.cs, scores.shape[1]
    order = top_channels(wanted, min(cs + 1, channels))
    if choice.slot_order == "rank":
        ranked = scores.gather(1, order)
        return ranked[:, :-1] - ranked[:, 1:]
    if cs == channels:
        return scores[:, :0]
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, :cs], True)
    with torch.no_grad():
        least = scores.masked_fill(~chosen, torch.inf).amin(dim=1, keepdim=True)
        largest = scores.masked_fill(chosen, -torch.inf).amax(dim=1, keepdim=True)
        line = (least + largest) / 2
    return 2 * torch.where(chosen, scores - line, line - scores)


def margin_shortfall(
    scores: Sequence[Tensor], wanted: Sequence[Tensor], choices: Sequence[Choice], gap: float
) -> Tensor:
    """Return by how much gaps fall short of `gap`: ``sum_k max(0, 1 - gap_k / gap)``, mean over images and ACHs.

    A sum, because every channel that crowds the line between chosen and refused has to leave it. 0 without scores.
    """
    if not scores:
        return torch.zeros(())
    triples = zip(scores, wanted, choices, strict=True)
    return torch.stack([F.relu(1 - score_gaps(*triple) / gap).sum(dim=1).mean() for triple in triples]).mean()
