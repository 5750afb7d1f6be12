"""Who is to blame for the error of the logits: every rounding alone, and every one left out.

The reference is the calibrated graph with nothing rounded: the weights that ship, in float. Every run selects channels
by its own scores, so a rounding answers for the channels it swaps, too; what it does apart from that is measured
once more with the reference's selections held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import GraphModule

from hadaptive_q.lower.parity import sqnr_db
from hadaptive_q.quant.sites import Site
from hadaptive_q.report.explanation import Blame
from hadaptive_q.rewrite.kept_run import KeptRun, kept_batches


@dataclass
class _Runs:
    """Logits of one site's runs, batch by batch: it alone rounds, it alone with selections held, all but it."""

    alone: list[Tensor] = field(default_factory=list)
    held: list[Tensor] = field(default_factory=list)
    without: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Blames:
    """Logits where nothing rounds, where everything does, and where it does with the selections of the first held;
    a blame for every site that was asked for."""

    plain: Tensor
    rounded: Tensor
    held: Tensor
    sites: list[Blame]


@torch.no_grad()
def measure_blame(
    graph: GraphModule, every: Sequence[Site], asked: Sequence[Site], selections: set[str], inputs: Tensor
) -> Blames:
    """Blame the sites `asked`, out of `every` site of the calibrated `graph`, for the error of its logits on `inputs`.

    `selections` are the nodes that choose channels.
    """
    choices = {node for node in graph.graph.nodes if node.name in selections}
    total, runs = _Runs(), [_Runs() for _ in asked]
    plain: list[Tensor] = []
    for batch in kept_batches(inputs):
        _switch(every, on=False)
        still = KeptRun(graph, batch)
        plain.append(still.logits)
        for site, kept in zip(asked, runs, strict=True):
            site.switch(True)
            kept.alone.append(still.again(site.places))
            kept.held.append(still.again(site.places, choices) if choices else kept.alone[-1])
            site.switch(False)
        _switch(every, on=True)
        total.held.append(still.again([place for site in every for place in site.places], choices))
        del still  # its values are no longer needed, and the next run has as many
        rounded = KeptRun(graph, batch)
        total.alone.append(rounded.logits)
        for site, kept in zip(asked, runs, strict=True):
            site.switch(False)
            kept.without.append(rounded.again(site.places))
            site.switch(True)
    logits = torch.cat(plain), torch.cat(total.alone)
    return Blames(*logits, torch.cat(total.held), [_blame(*logits, kept) for kept in runs])


def _switch(sites: Sequence[Site], on: bool) -> None:
    for site in sites:
        site.switch(on)


def _blame(plain: Tensor, rounded: Tensor, runs: _Runs) -> Blame:
    alone, held, without = (torch.cat(logits) for logits in (runs.alone, runs.held, runs.without))
    noise = _noise(plain, rounded)
    return Blame(
        alone_db=sqnr_db(plain, alone),
        gained_db=sqnr_db(plain, without) - sqnr_db(plain, rounded) if noise else 0.0,
        share=_noise(plain, alone) / noise if noise else 0.0,
        held_share=_noise(plain, held) / noise if noise else 0.0,
    )


def _noise(reference: Tensor, noisy: Tensor) -> float:
    return float((reference.double() - noisy.double()).square().sum())
