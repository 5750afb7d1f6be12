"""Move gains across the cross-Hadamard products: to the operands before them, to the filters behind them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from hadaptive_q.rewrite.graph import add_parameter, aten, constant
from hadaptive_q.rewrite.permute_channels import replace_constant


@torch.no_grad()
def scale_readers(graph: GraphModule, stored: Node, gain: Tensor) -> None:
    """Multiply the filters of all depthwise convolutions that read `stored` by `gain`, one per channel.

    Exact where `stored` is divided by it: a gain multiplies, so zero padding stays zero.
    """
    for conv in stored.users:
        filters = conv.args[1]
        assert isinstance(filters, Node)
        value = constant(graph, filters)
        assert value is not None
        replace_constant(graph, filters, value * gain.reshape(-1, 1, 1, 1))


def scale_operands(graph: GraphModule, product: Node, factor: Tensor) -> None:
    """Multiply `Z` of ``Z[:, i] * Z[:, j]`` by `factor`: a few channels instead of all their products."""
    indices = [a for a in product.args if isinstance(a, Node)]
    z = indices[0].args[0]
    assert isinstance(z, Node)
    value = add_parameter(graph, f"{product.name}_slope", factor, indices[0])
    with graph.graph.inserting_before(indices[0]):
        scaled = graph.graph.call_function(aten.mul.Tensor, (z, value))
    scaled.meta = dict(z.meta)
    # Both readers lie behind the first one's place: operands are made one after the other.
    for index in indices:
        index.replace_input_with(z, scaled)
