"""Rounding of 4-bit weights with error feedback: what rounding a weight adds to a layer's outputs, the next take back.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from hadaptive_q.quant.backends.torchao_pt2e import Calibrated, snap_biases, weight_quantizer
from hadaptive_q.rewrite.graph import constant

# Added to the diagonal of a layer's second moments, as a share of its mean.
DAMPING = 0.01
# Columns whose errors are kept back and fed to all later columns at once.
BLOCK = 64
# A channel is rounded with each of these shares of its scale; the one of least error stays.
SHARES = (1.0, 0.9, 0.8, 0.7, 0.6)


@torch.no_grad()
def round_with_feedback(calibrated: Calibrated, batches: Iterable[Tensor]) -> None:
    """Choose scales, weights and biases of every layer with 4-bit weights (in place), by its inputs on `batches`.

    A weight gets the value it had when it was rounded, with the errors of the columns before it: its nearest code is
    GPTQ's, and training starts from there. Scales are set, and the bias takes in what the mean of the outputs moved.
    """
    _Rounding(calibrated).run(torch.cat(list(batches)))
    snap_biases(calibrated.graph)


class _Rounding(Interpreter):
    """One run over all images at once; a layer is rounded when it is met, for the inputs that rounded layers give."""

    def __init__(self, calibrated: Calibrated) -> None:
        super().__init__(calibrated.graph)
        self.graph_module = calibrated.graph
        self.layers = {name for name, form in calibrated.plan.weights.items() if form.packed}

    def run_node(self, n: Node) -> Any:
        if n.name in self.layers:
            place = n.args[1]
            assert isinstance(place, Node)
            inputs, _, bias = (*self.fetch_args_kwargs_from_env(n)[0], None)[:3]
            weight, quantizer = constant(self.graph_module, place.args[0]), weight_quantizer(self.graph_module, n)
            assert weight is not None
            mean, moments = _statistics(inputs, weight.shape[1], centred=bias is not None)
            before = weight.flatten(1).clone()
            scale, rows = round_rows(before, quantizer.calculate_qparams()[0], moments, quantizer.quant_max)
            weight.copy_(rows.reshape(weight.shape))
            quantizer.hold(scale)
            self.env[place] = quantizer(weight)
            if bias is not None:
                bias.add_((before - self.env[place].flatten(1)) @ mean)
        return super().run_node(n)


def _statistics(inputs: Tensor, columns: int, centred: bool) -> tuple[Tensor, Tensor]:
    """Return mean `(C,)` and second moments `(C, C)`, around the mean if `centred`, of a layer's inputs."""
    pixels = (inputs.movedim(1, -1) if inputs.dim() == 4 else inputs).reshape(-1, columns)
    mean = pixels.mean(0)
    seen = (pixels - mean if centred else pixels).double()
    return mean, seen.T @ seen / len(seen)


def round_rows(rows: Tensor, scale: Tensor, moments: Tensor, high: int) -> tuple[Tensor, Tensor]:
    """Return scales `(R,)` and weights `(R, C)` whose nearest codes lower ``(w - w_q) M (w - w_q)`` of each row.

    `rows` are the weights `(R, C)`, `scale` the largest scales to consider, `moments` the `M` `(C, C)` of the inputs,
    `high` the largest code.
    """
    # The columns that matter most come first: the later ones take their errors.
    order = moments.diagonal().argsort(descending=True)
    sorted_ = moments[order][:, order]
    ridge = DAMPING * sorted_.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(sorted_ + ridge * torch.eye(len(order)).to(sorted_)))
    factor = torch.linalg.cholesky(inverse, upper=True).to(rows)
    scales = torch.cat([scale * share for share in SHARES])
    found = _feed_back(rows[:, order].repeat(len(SHARES), 1), scales, factor, high)[:, order.argsort()]
    off = (_nearest(found, scales, high) - rows.repeat(len(SHARES), 1)).double()
    errors = ((off @ moments) * off).sum(1).reshape(len(SHARES), -1)
    best = errors.argmin(0) * len(rows) + torch.arange(len(rows))
    return scales[best], found[best]


def _feed_back(rows: Tensor, scales: Tensor, factor: Tensor, high: int) -> Tensor:
    """Round `rows` `(R, C)` column by column; return each as it was when its turn came.

    `factor` is the upper Cholesky factor of the inverse of the moments.
    """
    rows = rows.clone()
    for start in range(0, rows.shape[1], BLOCK):
        end = min(start + BLOCK, rows.shape[1])
        errors = rows.new_zeros(len(rows), end - start)
        for column in range(start, end):
            now = rows[:, column : column + 1]
            error = (now - _nearest(now, scales, high)) / factor[column, column]
            rows[:, column + 1 : end] -= error * factor[column, column + 1 : end]
            errors[:, column - start] = error[:, 0]
        rows[:, end:] -= errors @ factor[start:end, end:]
    return rows


def _nearest(rows: Tensor, scales: Tensor, high: int) -> Tensor:
    zeros = torch.zeros_like(scales, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(rows, scales, zeros, 0, -high, high)
