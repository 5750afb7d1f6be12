"""Equalise the slots of BatchNorm-type products, so that one int8 scale serves them all.

Formula: with ``y_p = s_p Z_i Z_j + t_p`` the norm of slot p and ``g_p = sign(gamma_p) (8 |gamma_p| + |beta_p|)``,
``y_p / g_p`` is stored and the filters of the depthwise convolutions that read it take `g_p`. Exact: `g_p` multiplies,
so zero padding stays zero, and a scale per filter absorbs it.

Why this gain: by its own statistics a norm's output has mean beta and deviation |gamma|, so no data are needed. Its
range is beta plus a crest factor times |gamma|; products are heavy-tailed, and 8 deviations is where the
quantization error of a product of two normals is least. The sign turns all the long tails one way: products of
correlated channels are skewed. SQNR of 276 slots in one int8 scale with a mean-square-optimal range, gamma
log-normal (deviation of the logarithm in brackets), beta normal:

    g_p                        none   |gamma|   |gamma|+|beta|   8|gamma|+|beta|
    gamma (1.0), beta (0.3)    19.4      34.0             33.7              34.1
    gamma (0.5), beta (1.0)    29.1      34.9             33.1              35.3
    gamma (2.0), beta (0.3)    23.2      13.6             32.6              33.8

Where the slopes ``s_p / g_p`` are a product ``a_i a_j`` of one factor per operand to within `UNEVEN`, the operands
take `a` instead (Cs channels) and the multiplication of all Cs (Cs - 1) / 2 products falls away: any `g` is exact,
so ``g_p = s_p / (a_i a_j)`` is too, and its slots fill the scale but for that factor. The deviation of a product is
nearly that of its operands multiplied, and |gamma| cancels, so most norms are so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from hadaptive_q.models.cross_hadamard import pair_indices
from hadaptive_q.rewrite.fold_batch_norm import AFFINE
from hadaptive_q.rewrite.gains import scale_operands, scale_readers
from hadaptive_q.rewrite.graph import aten, calls, finish, is_depthwise, split_constant
from hadaptive_q.rewrite.permute_channels import replace_constant
from hadaptive_q.rewrite.products import indexed_operand

CREST = 8.0
UNEVEN = 1.5
SMALLEST_GAIN = 2.0**-10


@dataclass(frozen=True)
class _Match:
    """``last = add(mul(product, scale), shift)``; the norm's own `gamma` and `beta` are `(E,)`."""

    last: Node
    scaled: Node
    product: Node
    scale: Tensor
    shift: Tensor
    gamma: Tensor
    beta: Tensor


def equalise_products(graph: GraphModule) -> int:
    """Equalise every BatchNorm over an indexed product in place and return how many there were."""
    count = 0
    for node in calls(graph, aten.add.Tensor):
        match = _match(graph, node)
        if match is not None and all(is_depthwise(graph, user) for user in node.users):
            _equalise(graph, match)
            count += 1
    finish(graph)
    return count


def even_gain(gamma: Tensor, beta: Tensor) -> Tensor:
    """Return the gain of every slot `(E,)`; a slot that is always zero gets the smallest."""
    gain = (CREST * gamma.abs() + beta.abs()).clamp_min(SMALLEST_GAIN)
    return torch.where(gamma < 0, -gain, gain)


def operand_factors(slope: Tensor, cs: int) -> Tensor | None:
    """Return `a` `(cs,)` with ``a_i a_j`` within a factor `UNEVEN` of `slope` `(E,)`, or None where there is none.

    Least squares of ``log a_i + log a_j = log slope_ij``; unique for ``cs > 2``, the even one for ``cs == 2``.
    """
    if not (slope > 0).all():
        return None
    i, j = pair_indices(cs)
    incidence = torch.zeros(len(i), cs, dtype=torch.float64)
    rows = torch.arange(len(i))
    incidence[rows, i] = incidence[rows, j] = 1
    wanted = slope.double().log()
    logs = torch.linalg.pinv(incidence) @ wanted
    uneven = float((incidence @ logs - wanted).abs().max().exp())
    return logs.exp().float() if uneven <= UNEVEN else None


def _match(graph: GraphModule, last: Node) -> _Match | None:
    outer = split_constant(graph, last) if AFFINE in last.meta else None
    inner = split_constant(graph, outer[1]) if outer else None
    if outer is None or inner is None or inner[1].target != aten.mul.Tensor or indexed_operand(inner[1]) is None:
        return None
    return _Match(last, outer[1], inner[1], inner[0], outer[0], *last.meta[AFFINE])


def choose_gain(scale: Tensor, gamma: Tensor, beta: Tensor, cs: int) -> tuple[Tensor, Tensor | None]:
    """Return the gain of every slot `(E,)` and the operands' factors `(cs,)`, if they can take the slopes."""
    gain = even_gain(gamma, beta)
    factors = operand_factors(scale / gain, cs)
    if factors is None:
        return gain, None
    i, j = pair_indices(cs)
    return scale / (factors[i] * factors[j]), factors


@torch.no_grad()
def _equalise(graph: GraphModule, match: _Match) -> None:
    scale, shift = match.scale.flatten(), match.shift.flatten()
    z = indexed_operand(match.product)
    assert z is not None
    gain, factors = choose_gain(scale, match.gamma, match.beta, int(z.meta["val"].shape[1]))
    if factors is not None:
        scale_operands(graph, match.product, factors.reshape(1, -1, 1, 1))
        match.scaled.replace_all_uses_with(match.product)
    else:
        _set_constant(graph, match.scaled, scale / gain)
    _set_constant(graph, match.last, shift / gain)
    scale_readers(graph, match.last, gain)
    # What is stored is no longer the norm's own output.
    del match.last.meta[AFFINE]


def _set_constant(graph: GraphModule, node: Node, value: Tensor) -> None:
    """Give the per-channel constant that `node` reads another `value` `(E,)`."""
    (reader,) = (a for a in node.args if isinstance(a, Node) and a.op == "get_attr")
    replace_constant(graph, reader, value.reshape(1, -1, 1, 1))
