"""Scales at which x86-64 and ARM64 round every product of two codes alike.

One multiplies in float32 and rounds half to even (`arithmetic.multiply`), the other shifts an integer and rounds half
up (`arithmetic.multiply_arm64`): of the products of codes a few may lie so near a half that both differ. There are
65,536 pairs of codes at most, so all are tried; where one differs, the result's scale moves by its last bit, a relative
2^-24 that shows nowhere else. About every second scale will do.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from hadaptive_q.quant import arithmetic
from hadaptive_q.quant.arithmetic import Grid
from hadaptive_q.quant.fake_quant import ActivationFakeQuantize
from hadaptive_q.quant.plan import stored
from hadaptive_q.rewrite.graph import aten, calls

# More than any scale took in thousands; ratios of powers of two, whose halves are exact, are left at once.
ATTEMPTS = 1000


@torch.no_grad()
def settle_products(graph: GraphModule) -> int:
    """Move the scales of products in the calibrated `graph` until they are portable; return how often one moved.

    In the order of the data: what a product makes may be a factor of the next. Raises ArithmeticError where no scale
    near by will do.
    """
    total = 0
    # Again where tensors share a scale: one that moved for the second product may no longer suit the first.
    while moved := sum(_settle(graph, node) for node in calls(graph, aten.mul.Tensor)):
        total += moved
    return total


def _settle(graph: GraphModule, product: Node) -> bool:
    quantizers = [_quantizer(graph, place) for place in (*product.all_input_nodes, *stored(product).users)]
    a, b, out = quantizers if len(quantizers) == 3 else (None, None, None)
    if a is None or b is None or out is None:
        return False
    scale = portable_scale(_grid(a), _grid(b), _grid(out))
    moved = scale != float(out.scale)
    out.scale.fill_(scale)
    return moved


def portable_scale(a: Grid, b: Grid, out: Grid) -> float:
    """Return the scale nearest to that of `out`, from it upwards, at which all products of codes are portable."""
    first, second = every_pair()
    scale = torch.tensor(out.scale, dtype=torch.float32)
    for _ in range(ATTEMPTS):
        grids = a, b, Grid(float(scale), out.zero_point)
        if torch.equal(arithmetic.multiply(first, second, *grids), arithmetic.multiply_arm64(first, second, *grids)):
            return float(scale)
        scale = torch.nextafter(scale, torch.tensor(torch.inf))
    raise ArithmeticError(f"no portable scale of a product within {ATTEMPTS} steps of {out.scale}")


def every_pair() -> tuple[Tensor, Tensor]:
    """Return all pairs of two codes, each `(65536,)` int8."""
    codes = torch.arange(arithmetic.LOWEST, arithmetic.HIGHEST + 1, dtype=torch.int8)
    return codes.repeat_interleave(len(codes)), codes.repeat(len(codes))


def _quantizer(graph: GraphModule, node: Node) -> ActivationFakeQuantize | None:
    found = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    return found if isinstance(found, ActivationFakeQuantize) else None


def _grid(quantizer: ActivationFakeQuantize) -> Grid:
    scale, zero_point = quantizer.calculate_qparams()
    return Grid(float(scale), int(zero_point))
