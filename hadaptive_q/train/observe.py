"""Networks that show what a loss needs besides the logits: ACH's scores and the blocks' outputs.

A float network is watched by hooks, a graph has further outputs; both answer alike, so one loss serves both trainings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from hadaptive_q.models.batch_random import dropout
from hadaptive_q.models.config import SlotOrder
from hadaptive_q.models.network import Network
from hadaptive_q.rewrite.graph import aten, constant, module_paths
from hadaptive_q.rewrite.products import Product, find_products
from hadaptive_q.train.depthwise_gradient import conv2d


class Observed(NamedTuple):
    """`logits` `(B, classes)`; the blocks' outputs `(B, C, H, W)`; a selection's scores `(B, C)`.

    Scores are in units of X~, divided by the norm of the scorer's weights: an error of the channels' means reaches the
    scores times that norm, so larger weights widen nothing.
    """

    logits: Tensor
    features: list[Tensor]
    scores: list[Tensor]


class Choice(NamedTuple):
    """How many channels an ACH chooses, and whether slots are in the order of ranks or of channels."""

    cs: int
    slot_order: SlotOrder


class ObservedModel(nn.Module):
    """`network` as it is; hooks watch its scorers and blocks while it runs, and no longer."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self.choices = [Choice(ach.cs, ach.slot_order) for _, ach in network.ach_modules() if ach.frozen is None]

    def forward(self, x: Tensor) -> Observed:
        scores: list[Tensor] = []
        features: list[Tensor] = []
        hooks = [ach.scorer.register_forward_hook(_watcher(scores)) for _, ach in self.network.ach_modules()]
        for block in self.network.blocks:
            hooks.append(block.register_forward_hook(lambda _module, _inputs, out: features.append(out)))
        try:
            return Observed(self.network(x), features, scores)
        finally:
            for hook in hooks:
                hook.remove()


def _watcher(scores: list[Tensor]) -> Callable[[nn.Module, object, Tensor], None]:
    def watch(scorer: nn.Module, _inputs: object, values: Tensor) -> None:
        weight = scorer.weight
        assert isinstance(weight, Tensor)
        scores.append(values.float() / weight.norm())

    return watch


class ObservedGraph(nn.Module):
    """A deploy graph, prepared for quantization or not, with its parameters and modules shared, not copied."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__()
        scorings = [_scoring(graph, product) for product in find_products(graph) if product.choice]
        self.weights = [weight for _, weight in scorings]
        self.network = _with_outputs(graph, [*_block_outputs(graph), *(scores for scores, _ in scorings)])

    def forward(self, x: Tensor) -> Observed:
        logits, *inner = self.network(x)
        count = len(inner) - len(self.weights)
        scores = [values / weight.norm() for values, weight in zip(inner[count:], self.weights, strict=True)]
        return Observed(logits, inner[:count], scores)


def _scoring(graph: GraphModule, product: Product) -> tuple[Node, Tensor]:
    """Return the scores that `product` chooses by and the scorer's weights."""
    (choice,) = (node for node in graph.graph.nodes if node.name == product.choice)
    # The choice has no gradient: its scores are detached, and nothing else behind it is.
    detached = _first_behind(choice, aten.detach.default)
    weight = constant(graph, _first_behind(detached, aten.conv1d.default).args[1])
    assert weight is not None
    scores = detached.args[0]
    assert isinstance(scores, Node)
    return scores, weight


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
    for node in wider.find_nodes(op="call_function", target=aten.dropout.default):
        node.target = dropout
    for node in wider.find_nodes(op="call_function", target=aten.conv2d.default):
        node.target = conv2d
    first = output[0] if isinstance(output, tuple | list) else output
    wider.output((first, *(copied[node] for node in nodes)))
    return GraphModule(graph, wider)
