"""Every place of a calibrated graph where values are rounded to codes, each with a switch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.fx import GraphModule, Node

from hadaptive_q.quant.fake_quant import ActivationFakeQuantize, PerChannelWeightFakeQuantize
from hadaptive_q.rewrite.graph import module_path

FakeQuantizer = ActivationFakeQuantize | PerChannelWeightFakeQuantize


@dataclass(frozen=True)
class Site:
    """One fake-quantizer and what goes through it.

    `layer` is the module that makes the tensor or owns the weight; `tensors` are node names in the order of the data,
    several where they share a scale; `places` are the calls of the fake-quantizer.
    """

    layer: str
    kind: Literal["activation", "weight"]
    tensors: tuple[str, ...]
    places: tuple[Node, ...]
    quantizer: FakeQuantizer

    def switch(self, on: bool) -> None:
        """Round from now on, or let values pass."""
        self.quantizer.enable_fake_quant(on)

    def clipped(self, x: Tensor) -> Tensor:
        """Return where `x` lies beyond the codes, as booleans of its shape."""
        scale, zero_point = self.quantizer.calculate_qparams()
        per_channel = (-1, *[1] * (x.dim() - 1))
        codes = (x / scale.reshape(per_channel)).round() + zero_point.reshape(per_channel)
        return (codes < self.quantizer.quant_min) | (codes > self.quantizer.quant_max)


def bits_of(quantizer: FakeQuantizer) -> int:
    """Return the bits of a code of `quantizer`."""
    return int(quantizer.quant_max).bit_length() + 1


def find_sites(graph: GraphModule) -> list[Site]:
    """Return the fake-quantizers of `graph` in the order of the data, each once, also where tensors share it."""
    # Duplicates too: a shared quantizer has several names.
    modules = dict(graph.named_modules(remove_duplicate=False))
    places: dict[FakeQuantizer, list[Node]] = {}
    for node in graph.graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, FakeQuantizer):
            places.setdefault(module, []).append(node)
    order = {node: index for index, node in enumerate(graph.graph.nodes)}
    # A weight stands where its layer reads it; its own node may be anywhere before.
    found = sorted(places.items(), key=lambda item: order[_maker(item[1][0])])
    return [_site(quantizer, calls) for quantizer, calls in found]


def quantizer_of(graph: GraphModule, name: str) -> ActivationFakeQuantize:
    """Return the fake-quantizer of the tensor that node `name` makes."""
    (node,) = (node for node in graph.graph.nodes if node.name == name)
    (found,) = {graph.get_submodule(str(user.target)) for user in node.users if user.op == "call_module"}
    assert isinstance(found, ActivationFakeQuantize)
    return found


def _site(quantizer: FakeQuantizer, places: list[Node]) -> Site:
    return Site(
        layer=module_path(_maker(places[0])) or "input",
        kind="weight" if isinstance(quantizer, PerChannelWeightFakeQuantize) else "activation",
        tensors=tuple(_source(place).name for place in places),
        places=tuple(places),
        quantizer=quantizer,
    )


def _source(place: Node) -> Node:
    source = place.args[0]
    assert isinstance(source, Node)
    return source


def _maker(place: Node) -> Node:
    """Return the node that makes an activation, or reads a weight."""
    source = _source(place)
    return next(iter(place.users)) if source.op == "get_attr" else source
