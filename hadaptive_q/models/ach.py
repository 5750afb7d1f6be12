"""Adaptive Cross-Hadamard (ACH): a learned choice of channels whose pairwise products become new channels.

Source: arXiv 2505.22226v2, section on the ACH module.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hadaptive_q.models.batch_random import exponential_like
from hadaptive_q.models.config import Norm, SlotOrder
from hadaptive_q.models.cross_hadamard import cross_hadamard, pair_indices

TAU_INITIAL, TAU_MINIMUM, TAU_STEP = 4.0, 0.01, 0.005


class _DySoftFunction(torch.autograd.Function):
    """DySoft with a gradient from its own output: ``1 / (1 + |t|)^2 = (1 - |u|)^2`` for ``u = t / (1 + |t|)``."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        t = alpha * q
        u = t / t.abs().add_(1.0)
        ctx.save_for_backward(q, u, alpha, weight)
        return torch.addcmul(bias, u, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        q, u, alpha, weight = ctx.saved_tensors
        slope = u.abs().neg_().add_(1.0).square_()
        slope.mul_(gradient).mul_(weight)
        return (
            slope * alpha,
            # Under autocast the product is in half precision while the slope, as everything `alpha` meets, is not.
            torch.dot(slope.flatten(), q.flatten().to(slope.dtype)).reshape(alpha.shape),
            (gradient * u).sum((0, 2, 3), keepdim=True),
            gradient.sum((0, 2, 3), keepdim=True),
        )


class DySoft(nn.Module):
    """Dynamic softsign.

    Formula: ``y = w * a q / (1 + |a q|) + b``, bounded by ``b +- |w|``.
    Shapes: `q` and `y` `(B, E, H, W)`, `a` `(1,)`, `w` and `b` `(1, E, 1, 1)`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor([0.5]))
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, q: Tensor) -> Tensor:
        if self.training:
            out: Tensor = _DySoftFunction.apply(q, self.alpha, self.weight, self.bias)
            return out
        t = self.alpha * q
        return self.weight * (t / (1.0 + t.abs())) + self.bias


class ChannelScorer(nn.Module):
    """Score every channel from its mean and those of its four neighbours.

    Formula: ``xi = conv1d_k5(mean_hw(X))``, no bias, no sigmoid. Shapes: `(B, C, H, W) -> (B, C)`.

    Float32 under autocast, too: neighbouring ranks lie closer together than half precision can tell.

    The temperature follows the norm of this convolution's gradient, see `step_temperature`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.Conv1d(1, 1, 5, bias=False).weight.detach().clone())
        self.register_buffer("tau", torch.tensor(TAU_INITIAL))
        # NaN stands for "no such step yet"; buffers, so that a resumed run continues exactly. The authors' checkpoints
        # hold both.
        self.register_buffer("gradient_norm", torch.tensor(float("nan")))
        self.register_buffer("stored_norm", torch.tensor(float("nan")))

    tau: Tensor
    gradient_norm: Tensor
    stored_norm: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self._scores(x.mean((-1, -2), keepdim=True, dtype=torch.float32))
        return self._scores(x.mean((-1, -2), keepdim=True))

    def _scores(self, means: Tensor) -> Tensor:
        # Views only: XNNPACK takes them, and squeeze and transpose it does not.
        channels = means.shape[1]
        return F.conv1d(means.reshape(-1, 1, channels), self.weight, padding=2).reshape(-1, channels)

    @torch.no_grad()
    def step_temperature(self) -> None:
        """Follow the gradient of a step: once per step, whole and unscaled, before it is clipped or cleared.

        The temperature rises by 0.5 % when the norm did not shrink since the step before, falls by 0.5 % otherwise,
        within [0.01, 4].
        """
        if self.weight.grad is None:
            return
        norm = self.weight.grad.norm()
        if not norm.isfinite():
            return
        if self.gradient_norm.isfinite():
            sign = 1.0 if self.gradient_norm <= norm else -1.0
            self.tau.mul_(1 + TAU_STEP * sign).clamp_(TAU_MINIMUM, TAU_INITIAL)
        self.stored_norm.copy_(self.gradient_norm)
        self.gradient_norm.copy_(norm)


class ACH(nn.Module):
    """Adaptive Cross-Hadamard expansion.

    Formula: ``X~ = BN(W X + b)``; ``T = topk(scores(X~), cs)`` per sample, also at inference;
    ``Q_p = X~[T_i] * X~[T_j]`` for ``i < j``; ``Y = concat(X~, norm(Q))``.
    Shapes: `(B, C, H, W) -> (B, C + cs (cs - 1) / 2, H, W)`.

    In training the scores carry Gumbel noise times `noise` (1 as published, annealed to 0 by the training
    schedule) and the chosen channels a factor of value 1 whose gradient reaches the scorer:
    ``1 + M - stop_gradient(M)`` with ``M = softmax((xi + g) / tau)``.
    Of equal scores the lower channel comes first.

    `slot_order` "rank": slot (i, j) holds the i-th ranked times the j-th ranked channel (the authors' form);
    "channel": the chosen channels keep their channel order.
    `frozen` holds fixed channel indices `(cs,)` instead of the per-sample choice once `freeze` was called.
    """

    def __init__(self, channels: int, cs: int, norm: Norm = "dysoft", slot_order: SlotOrder = "rank") -> None:
        super().__init__()
        if not 2 <= cs <= channels:
            raise ValueError(f"cs must lie in [2, {channels}], got {cs}")
        self.cs, self.slot_order = cs, slot_order
        self.pointwise = nn.Conv2d(channels, channels, 1)
        self.bn = nn.BatchNorm2d(channels)
        self.scorer = ChannelScorer()
        i, j = pair_indices(cs)
        self.register_buffer("pair_i", i, persistent=False)
        self.register_buffer("pair_j", j, persistent=False)
        self.register_buffer("noise", torch.tensor(1.0), persistent=False)
        self.norm: nn.Module = DySoft(len(i)) if norm == "dysoft" else nn.BatchNorm2d(len(i))
        self.register_buffer("frozen", None, persistent=False)

    pair_i: Tensor
    pair_j: Tensor
    noise: Tensor
    frozen: Tensor | None

    @property
    def out_channels(self) -> int:
        return self.pointwise.out_channels + len(self.pair_i)

    def freeze(self, indices: Tensor) -> None:
        """Fix the chosen channels to `indices` `(cs,)` for every sample (``selection: static``)."""
        if indices.shape != (self.cs,):
            raise ValueError(f"expected {self.cs} indices, got shape {tuple(indices.shape)}")
        channels = self.pointwise.out_channels
        if indices.is_floating_point() or not 0 <= int(indices.min()) <= int(indices.max()) < channels:
            raise ValueError(f"expected channels below {channels}, got {indices.tolist()}")
        self.frozen = indices.to(self.pair_i.device)

    def select(self, scores: Tensor) -> Tensor:
        """Return the chosen channels `(B, cs)` of `scores` `(B, C)`, as at inference."""
        chosen = top_channels(scores, self.cs)
        # Sorted by a second topk: ExecuTorch's runtime has no sort.
        return -(-chosen).topk(self.cs, dim=1).values if self.slot_order == "channel" else chosen

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.pointwise(x))
        return torch.cat((x, self.norm(self._products(x))), dim=1)

    def _products(self, x: Tensor) -> Tensor:
        if self.frozen is not None:
            z = x[:, self.frozen]
        elif self.training:
            z = self._gumbel_gather(x, self.scorer(x))
        else:
            z = gather_channels(x, self.select(self.scorer(x)))
        if self.training:
            out: Tensor = cross_hadamard(z)
            return out
        return z[:, self.pair_i] * z[:, self.pair_j]

    def _gumbel_gather(self, x: Tensor, scores: Tensor) -> Tensor:
        # float32 whatever the autocast type: Gumbel noise takes two logarithms.
        scores = scores.float()
        noise = -exponential_like(scores).log()
        perturbed = scores + self.noise * noise
        soft = (perturbed / self.scorer.tau).softmax(dim=1)
        # Chosen before the softmax, which is zero for most channels once tau is small.
        chosen = self.select(perturbed.detach())
        out: Tensor = _StraightThroughGather.apply(x, chosen, soft.gather(1, chosen).to(x.dtype))
        return out


class _StraightThroughGather(torch.autograd.Function):
    """Gather channels times ``1 + M - stop_gradient(M)``: the factor is 1, its gradient is that of `M`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, indices: Tensor, probability: Tensor) -> Tensor:
        z = gather_channels(x, indices)
        ctx.save_for_backward(z, indices)
        ctx.channels = x.shape[1]
        return z

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        z, indices = ctx.saved_tensors
        into = gradient.new_zeros((gradient.shape[0], ctx.channels, *gradient.shape[2:]))
        # A sample never chooses a channel twice, so a plain scatter is enough.
        into.scatter_(1, indices[:, :, None, None].expand_as(gradient), gradient)
        return into, None, (gradient * z).sum((2, 3))


def top_channels(scores: Tensor, count: int) -> Tensor:
    """Return the channels `(B, count)` of the largest `scores` `(B, C)`, descending; of equal ones the lower first."""
    if torch.compiler.is_exporting():
        # `topk` leaves the order of equal scores open, but ExecuTorch's runtime has no sort for a graph that keeps
        # this operator. The deploy form replaces it and keeps the order.
        return scores.topk(count, dim=1).indices
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :count]


def gather_channels(x: Tensor, indices: Tensor) -> Tensor:
    """Return channels `indices` `(B, K)` of `x` `(B, C, H, W)` as `(B, K, H, W)`."""
    return x.gather(1, indices[:, :, None, None].expand(-1, -1, *x.shape[2:]))
