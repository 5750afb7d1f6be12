"""Depthwise convolutions whose gradients are matrix products, where a kernel is as large as the map it runs on.

Formula: tap `i` joins the places `y` of the result and `u` of the input where ``T[y, u, i] = 1``, so that
``dw[c, i] = sum_yu T[y, u, i] sum_b dy[b, c, y] x[b, c, u]`` and
``dx[b, c, u] = sum_y dy[b, c, y] sum_i T[y, u, i] w[c, i]``.
On such maps torch's gradient on CPUs takes 2 to 15 times as long; values are its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hadaptive_q.rewrite.graph import aten


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Return what the operator `aten.conv2d` does."""
    depthwise = x.shape[1] == weight.shape[0] == groups
    if x.device.type == "cpu" and depthwise and x[0, 0].numel() <= weight[0].numel():
        return _Depthwise.apply(x, weight, bias, stride, padding, dilation)  # type: ignore[no-any-return]
    return aten.conv2d.default(x, weight, bias, stride, padding, dilation, groups)  # type: ignore[no-any-return]


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Sequence[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings = settings
        return aten.conv2d.default(x, weight, bias, *settings, len(weight))  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        sides = zip(gradient.shape[2:], x.shape[2:], weight.shape[2:], *ctx.settings, strict=True)
        taps = torch.einsum("yui,xvj->yxuvij", *(_joined(*side) for side in sides)).to(x.dtype)
        taps = taps.reshape(-1, weight[0].numel())
        by_channel = gradient.to(x.dtype).flatten(2).permute(1, 2, 0)  # (C, y, B)
        pairs = by_channel @ x.flatten(2).permute(1, 0, 2)  # (C, y, u)
        weight_gradient = (pairs.flatten(1) @ taps).reshape(weight.shape).to(weight.dtype)
        x_gradient = bias_gradient = None
        if ctx.needs_input_grad[0]:
            spread = (weight.flatten(1).to(x.dtype) @ taps.T).reshape(pairs.shape)
            x_gradient = (by_channel.transpose(1, 2) @ spread).transpose(0, 1).reshape(x.shape)
        if ctx.needs_input_grad[2]:
            bias_gradient = by_channel.sum((1, 2)).to(weight.dtype)
        return x_gradient, weight_gradient, bias_gradient, None, None, None


def _joined(results: int, inputs: int, taps: int, stride: int, padding: int, dilation: int) -> Tensor:
    """Return, along one side, 1 where a tap joins a place of the result and one of the input, `(y, u, i)`."""
    read = torch.arange(results)[:, None] * stride + torch.arange(taps) * dilation - padding
    return (torch.arange(inputs)[None, :, None] == read[:, None]).float()
