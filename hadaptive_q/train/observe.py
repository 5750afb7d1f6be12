"""Networks that show what a loss needs besides the logits: ACH's scores, the gaps between them, the blocks' outputs.

A float network is watched by hooks, a graph has further outputs; both answer alike, so one loss serves both trainings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from hadaptive_q.models.ach import ACH
from hadaptive_q.models.config import SlotOrder
from hadaptive_q.models.hadaptive_net import HadaptiveNet
from hadaptive_q.rewrite.graph import aten, constant, module_paths
from hadaptive_q.rewrite.products import Product, find_products


class Observed(NamedTuple):
    """`logits` `(B, classes)`; by ACH with per-sample selection the scores `(B, C)` and their gaps; the blocks' outputs
    `(B, C, H, W)`."""

    logits: Tensor
    scores: list[Tensor]
    gaps: list[Tensor]
    features: list[Tensor]


def score_gaps(scores: Tensor, weight: Tensor, cs: int, slot_order: SlotOrder) -> Tensor:
    """Return the gaps that decide a selection, in units of X~: differences of `scores` (B, C) over ``|w|``.

    In rank order every gap from the first chosen to the first refused channel, ``xi_(r) - xi_(r+1)``, `(B, cs)`. In
    channel order ranks do not matter, but the line between chosen and refused does: ``2 |xi_c - t|`` with
    ``t = (xi_(cs) + xi_(cs+1)) / 2``, `(B, C)`; the gap between the two channels next to it is there twice.
    `w` are the scorer's weights: an error of the channels' means reaches the scores times their norm, so larger
    weights widen nothing. Where every channel is chosen none is refused, and that gap or line is missing.
    """
    top = scores.topk(min(cs + 1, scores.shape[1]), dim=1).values
    if slot_order == "rank":
        gaps = top[:, :-1] - top[:, 1:]
    elif cs < scores.shape[1]:
        gaps = 2 * (scores - top[:, -2:].mean(dim=1, keepdim=True).detach()).abs()
    else:
        gaps = scores[:, :0]
    return gaps / weight.norm()  # type: ignore[no-any-return]


class ObservedModel(nn.Module):
    """`network` as it is; hooks watch its scorers and blocks while it runs, and no longer."""

    def __init__(self, network: HadaptiveNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Observed:
        scores: list[Tensor] = []
        gaps: list[Tensor] = []
        features: list[Tensor] = []
        hooks = [ach.scorer.register_forward_hook(_watcher(ach, scores, gaps)) for _, ach in self.network.ach_modules()]
        hooks += [
            block.register_forward_hook(lambda _m, _i, out: features.append(out)) for block in self.network.blocks
        ]
        try:
            return Observed(self.network(x), scores, gaps, features)
        finally:
            for hook in hooks:
                hook.remove()


def _watcher(ach: ACH, scores: list[Tensor], gaps: list[Tensor]) -> Callable[[nn.Module, object, Tensor], None]:
    def watch(_scorer: nn.Module, _inputs: object, values: Tensor) -> None:
        scores.append(values.float())
        gaps.append(score_gaps(scores[-1], ach.scorer.weight, ach.cs, ach.slot_order))

    return watch


class ObservedGraph(nn.Module):
    """A deploy graph, prepared for quantization or not, with its parameters and modules shared, not copied.

    `slot_order` is that of the network the graph was traced from.
    """

    def __init__(self, graph: GraphModule, slot_order: SlotOrder) -> None:
        super().__init__()
        scorings = [_scoring(graph, product, slot_order) for product in find_products(graph) if product.choice]
        blocks = _block_outputs(graph)
        self.scorings = [scoring for _, scoring in scorings]
        self.network = _with_outputs(graph, [*(node for node, _ in scorings), *blocks])

    def forward(self, x: Tensor) -> Observed:
        logits, *inner = self.network(x)
        scores, features = inner[: len(self.scorings)], inner[len(self.scorings) :]
        gaps = [gaps_of(values) for gaps_of, values in zip(self.scorings, scores, strict=True)]
        return Observed(logits, scores, gaps, features)


def _scoring(graph: GraphModule, product: Product, slot_order: SlotOrder) -> tuple[Node, Callable[[Tensor], Tensor]]:
    """Return the scores that `product` chooses by and the function from them to their gaps."""
    nodes = {node.name: node for node in graph.graph.nodes}
    cs = int(nodes[product.chosen].meta["val"].shape[1])
    # The choice has no gradient: its scores are detached, and nothing else behind it is.
    detached = _first_behind(nodes[product.choice or ""], aten.detach.default)
    convolution = _first_behind(detached, aten.conv1d.default)
    weight = constant(graph, convolution.args[1])
    assert weight is not None
    scores = detached.args[0]
    assert isinstance(scores, Node)
    return scores, lambda values: score_gaps(values, weight, cs, slot_order)


def _first_behind(node: Node, target: object) -> Node:
    waiting = list(node.all_input_nodes)
    for source in waiting:
        if source.target == target:
            return source
        waiting.extend(source.all_input_nodes)
    raise ValueError(f"no {target} behind {node.name}")


def _block_outputs(graph: GraphModule) -> list[Node]:
    """Return the last tensor of every block, quantized where a fake-quantizer reads it."""
    last: dict[str, Node] = {}
    for node in graph.graph.nodes:
        for path in module_paths(node):
            parent, _, index = path.rpartition(".")
            if parent == "blocks" and index.isdigit():
                last[path] = node
    return [_quantized(node) for node in last.values()]


def _quantized(node: Node) -> Node:
    return next((user for user in node.users if user.op == "call_module"), node)


def _with_outputs(graph: GraphModule, nodes: Sequence[Node]) -> GraphModule:
    """Return a module over `graph`'s own parameters and submodules that answers ``(output, *nodes)``."""
    copied: dict[Node, Node] = {}
    wider = torch.fx.Graph()
    output = wider.graph_copy(graph.graph, copied)
    first = output[0] if isinstance(output, tuple | list) else output
    wider.output((first, *(copied[node] for node in nodes)))
    return GraphModule(graph, wider)
