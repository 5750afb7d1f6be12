"""Equalise the channels of an element-wise product that depthwise convolutions read, so that one int8 scale serves all.

Formula: with ``y = P * (a b)``, where `a` is a convolution's result that nothing else reads and P filters every
channel alone, ``s_c a_c`` is computed instead and P's filters are divided by `s_c`: ``s_c = min(max_k r_k / r_c,
LARGEST)`` with `r_c` the largest magnitude of channel c of ``a b``. Exact: a gain multiplies, so P's zero padding stays
zero, and a scale per filter absorbs it, in `a` and in P.

A product of two bell-shaped factors is heavy-tailed and its channels differ more than theirs do. Of two convolutions
that could take the gain, that one does whose own channels stay more even.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from hadaptive_q.rewrite.gains import scale_readers
from hadaptive_q.rewrite.graph import aten, calls, constant, is_depthwise
from hadaptive_q.rewrite.permute_channels import replace_constant
from hadaptive_q.rewrite.record import record

LARGEST = 16.0


def equalise_multiplications(graph: GraphModule, batches: Sequence[Tensor]) -> int:
    """Equalise every such product in place by what `batches` of inputs make of it; return how many there were.

    One with NaN or infinity keeps its channels: calibration says where they come from.
    """
    found = {node: able for node in calls(graph, aten.mul.Tensor) if (able := _able(graph, node))}
    names = {node.name for product, able in found.items() for node in (product, *able)}
    largest: dict[str, Tensor] = {}
    for inputs in batches if names else ():
        for name, values in record(graph, inputs, names).items():
            magnitude = values.abs().amax(dim=(0, 2, 3))
            largest[name] = torch.maximum(largest.get(name, magnitude), magnitude)
    for product, able in found.items():
        gain = _even(largest[product.name])
        _scale_layer(graph, min(able, key=lambda layer: _unevenness(largest[layer.name] * gain)), gain)
        scale_readers(graph, product, 1 / gain)
    graph.recompile()
    return len(found)


def _able(graph: GraphModule, product: Node) -> list[Node]:
    """Return the factors that can take a gain, none where a reader of `product` cannot."""
    if not product.users or not all(is_depthwise(graph, user) and user.args[0] is product for user in product.users):
        return []
    shape = product.meta["val"].shape
    return [
        factor
        for factor in product.all_input_nodes
        if factor.target == aten.conv2d.default
        and len(factor.users) == 1
        and constant(graph, factor.args[1]) is not None
        and factor.meta["val"].shape[1:] == shape[1:]
    ]


def _even(largest: Tensor) -> Tensor:
    """Return the gains `(C,)` that bring every channel up to the largest; a channel of zeros keeps its own."""
    gain = (largest.max() / largest).clamp_max(LARGEST)
    return torch.where(largest > 0, gain, 1.0) if largest.isfinite().all() else torch.ones_like(largest)


def _unevenness(largest: Tensor) -> float:
    """Return the mean squared error of all channels relative to each one's own magnitude, with one scale for all."""
    seen = largest[largest > 0]
    return float((seen.max() / seen).square().mean()) if len(seen) else 0.0


@torch.no_grad()
def _scale_layer(graph: GraphModule, layer: Node, gain: Tensor) -> None:
    for place in layer.args[1:3]:
        value = constant(graph, place)
        if value is not None:
            assert isinstance(place, Node)
            replace_constant(graph, place, value * gain.reshape(-1, *(1,) * (value.dim() - 1)))
