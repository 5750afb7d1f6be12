"""What every layer costs and spares if its weights go from 8 to 4 bits, one layer at a time.

Measured on a calibrated graph with everything rounded as it ships and every weight in 8 bits, without training. The
sensitivity of a layer is the noise it adds to the logits: ``sum (l4 - l8)^2 / sum l8^2`` over the images given, `l4`
with this layer alone in 4 bits; -10 log10 of it is the SQNR of `l4` in dB. This SQNR stands in for the drop of
accuracy. Single noises add up as far as errors of different layers are independent: `joint_noise` measures a choice
of layers together, to be held against their sum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from hadaptive_q.quant.backends.torchao_pt2e import LARGEST_SHIFTED_BIAS, bias_codes, weight_quantizer
from hadaptive_q.quant.formats import WeightFormat
from hadaptive_q.quant.plan import takes_four_bits
from hadaptive_q.rewrite.graph import aten, constant, module_path
from hadaptive_q.rewrite.kept_run import KeptRun, kept_batches

# With 4 bits a convolution is written as a Fully Connected, whose record has no window, steps, padding and groups.
SHORTER_RECORD = 32


@dataclass(frozen=True)
class FourBitLayer:
    """A layer that can have 4-bit weights: its module's name, its nodes, its weights, what it spares and adds.

    `bytes_saved`: half a byte per weight, and what a convolution's record is shorter; its scales and biases stay.
    """

    layer: str
    nodes: tuple[str, ...]
    weights: int
    bytes_saved: int
    sensitivity: float = 0.0


def find_layers(graph: GraphModule) -> list[FourBitLayer]:
    """Return the layers of the deploy graph `graph` that can have 4-bit weights, in the order of the data."""
    found: dict[str, list[Node]] = {}
    for node in graph.graph.nodes:
        if takes_four_bits(graph, node):
            found.setdefault(module_path(node), []).append(node)
    return [_layer(graph, name, nodes) for name, nodes in found.items()]


def _layer(graph: GraphModule, name: str, nodes: list[Node]) -> FourBitLayer:
    weights = saved = 0
    for node in nodes:
        weight = constant(graph, node.args[1])
        assert weight is not None
        weights += weight.numel()
        saved += weight.numel() // 2 + (SHORTER_RECORD if node.target == aten.conv2d.default else 0)
    return FourBitLayer(name, tuple(node.name for node in nodes), weights, saved)


@torch.no_grad()
def measure_sensitivity(graph: GraphModule, layers: Sequence[FourBitLayer], inputs: Tensor) -> list[FourBitLayer]:
    """Return `layers` with their sensitivities on `inputs`, without those whose biases leave 4 bits no room.

    `graph` is calibrated, with 8-bit weights everywhere.
    """
    able = [layer for layer in layers if _has_room(graph, layer)]
    noises = _noises(graph, [[layer] for layer in able], inputs)
    return [dataclasses.replace(layer, sensitivity=noise) for layer, noise in zip(able, noises, strict=True)]


def joint_noise(graph: GraphModule, layers: Sequence[FourBitLayer], inputs: Tensor) -> float:
    """Return the noise that all of `layers` add together, in the unit of a sensitivity."""
    (noise,) = _noises(graph, [layers], inputs)
    return noise


@torch.no_grad()
def _noises(graph: GraphModule, choices: Sequence[Sequence[FourBitLayer]], inputs: Tensor) -> list[float]:
    """Return the noise that each of `choices` adds by itself."""
    noise, power = [0.0] * len(choices), 0.0
    for batch in kept_batches(inputs):
        run = KeptRun(graph, batch)
        power += float(run.logits.double().square().sum())
        for index, layers in enumerate(choices):
            noise[index] += _squared_error(run, graph, layers)
    return [each / power for each in noise]


@contextmanager
def in_four_bits(graph: GraphModule, layers: Iterable[FourBitLayer]) -> Iterator[list[Node]]:
    """Round the weights of `layers` to 4 bits meanwhile; yield the nodes where they are rounded."""
    nodes = _nodes(graph, layers)
    quantizers = [weight_quantizer(graph, node) for node in nodes]
    before = [(quantizer.quant_min, quantizer.quant_max) for quantizer in quantizers]
    try:
        for quantizer in quantizers:
            quantizer.quant_min, quantizer.quant_max = WeightFormat(4).code_range
        yield [place for node in nodes if isinstance(place := node.args[1], Node)]
    finally:
        for quantizer, bounds in zip(quantizers, before, strict=True):
            quantizer.quant_min, quantizer.quant_max = bounds


def _squared_error(run: KeptRun, graph: GraphModule, layers: Sequence[FourBitLayer]) -> float:
    if not layers:
        return 0.0
    with in_four_bits(graph, layers) as places:
        return float((run.again(places).double() - run.logits.double()).square().sum())


def _has_room(graph: GraphModule, layer: FourBitLayer) -> bool:
    with in_four_bits(graph, [layer]):
        found = [bias_codes(graph, node) for node in _nodes(graph, [layer])]
    return all(f is None or float(f[1].abs().max()) <= LARGEST_SHIFTED_BIAS for f in found)


def _nodes(graph: GraphModule, layers: Iterable[FourBitLayer]) -> list[Node]:
    names = {name for layer in layers for name in layer.nodes}
    return [node for node in graph.graph.nodes if node.name in names]
