"""Oscillation damping: hold weights near the code they have, so that the last steps do not flip them to and fro.

Source: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022, equation 5.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule

from hadaptive_q.rewrite.graph import constant


def oscillation_damping(graph: GraphModule, strength: float) -> Callable[[], Tensor]:
    """Return a function that gives ``strength * sum |w - stop_gradient(Q(w))|^2`` over the weights of `graph` now."""
    modules = dict(graph.named_modules(remove_duplicate=False))
    pairs = []
    for node in graph.graph.nodes:
        quantizer = modules.get(str(node.target)) if node.op == "call_module" else None
        weight = constant(graph, node.args[0]) if quantizer is not None else None
        if quantizer is not None and weight is not None:
            pairs.append((weight, quantizer))

    def penalty() -> Tensor:
        with torch.no_grad():
            codes = [quantizer(weight) for weight, quantizer in pairs]
        squares = [(weight - code).square().sum() for (weight, _), code in zip(pairs, codes, strict=True)]
        return strength * torch.stack(squares).sum()

    return penalty
