"""Forward and backward of one ACH: gather against the one-hot matrix product, side by side in one run.

    python benchmarks/ach_training.py

The one-hot form is the published training path: the choice as a (B, Cs, C) matrix times the flattened channels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hadaptive_q.models.ach import ACH

CHANNELS, CS, SIDE, BATCH = 96, 16, 14, 64
ROUNDS, WARMUP = 30, 5


class OneHotACH(ACH):
    """The same module in its published training form: one-hot choice, indexed pairs, norm in plain operators."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.pointwise(x))
        scores = self.scorer(x)
        noise = -torch.empty_like(scores).exponential_().log()
        soft = ((scores + self.noise * noise) / self.scorer.tau).softmax(dim=1)[:, None]
        hard = F.one_hot(self.select(soft.detach()[:, 0]), x.shape[1]).to(x.dtype)
        straight_through = hard - (hard * soft).detach() + hard * soft
        z = (straight_through @ x.flatten(2)).unflatten(2, x.shape[2:])
        t = self.norm.alpha * (z[:, self.pair_i] * z[:, self.pair_j])
        return torch.cat((x, self.norm.weight * (t / (1 + t.abs())) + self.norm.bias), dim=1)


def main() -> None:
    torch.manual_seed(0)
    gather, one_hot = ACH(CHANNELS, CS), OneHotACH(CHANNELS, CS)
    one_hot.load_state_dict(gather.state_dict())
    inputs = torch.randn(BATCH, CHANNELS, SIDE, SIDE)
    # Given, not made by a loss: a loss over the output would be timed with both.
    gradient = torch.randn(BATCH, gather.out_channels, SIDE, SIDE)
    times: dict[str, list[float]] = {"gather": [], "one-hot": []}
    for index in range(ROUNDS + WARMUP):
        for name, module in (("gather", gather), ("one-hot", one_hot)):
            seconds = _time(module, inputs.clone().requires_grad_(), gradient)
            if index >= WARMUP:
                times[name].append(seconds)
    ratios = [b / a for a, b in zip(times["gather"], times["one-hot"], strict=True)]
    for name, values in times.items():
        print(f"{name:8} median {statistics.median(values) * 1e3:7.2f} ms")
    print(f"one-hot / gather: median {statistics.median(ratios):.2f}, min {min(ratios):.2f}, max {max(ratios):.2f}")


def _time(module: Callable[[Tensor], Tensor], inputs: Tensor, gradient: Tensor) -> float:
    start = time.perf_counter()
    module(inputs).backward(gradient)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
