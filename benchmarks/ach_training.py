"""Forward and backward of ACH in its training forms, side by side in one run, and of their products alone.

    python benchmarks/ach_training.py

"fused" is what ships: gathered channels and the operator for their products. "indexed" writes the products as
``Z[i] * Z[j]``. "one-hot" is the published training path: the choice as a (B, Cs, C) matrix times the flattened
channels, and products as indexed. The blocks are those of Hadaptive-Net-M.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from hadaptive_q.models.ach import ACH, DySoft
from hadaptive_q.models.config import Norm
from hadaptive_q.models.cross_hadamard import cross_hadamard, pair_indices

BATCH, ROUNDS, WARMUP = 32, 12, 2
# Channels, Cs, the side at 224x224, and the norm of every kind of ACH in M.
BLOCKS: tuple[tuple[int, int, int, Norm], ...] = (
    (128, 24, 14, "dysoft"),
    (128, 24, 14, "batch_norm"),
    (192, 36, 7, "dysoft"),
    (192, 36, 7, "batch_norm"),
)


class IndexedACH(ACH):
    """The same module with its products in the indexed form, whose gradient is a scatter-add."""

    def _products(self, x: Tensor) -> Tensor:
        z = self._gumbel_gather(x, self.scorer(x))
        return z[:, self.pair_i] * z[:, self.pair_j]


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
        q = z[:, self.pair_i] * z[:, self.pair_j]
        if isinstance(self.norm, DySoft):
            t = self.norm.alpha * q
            q = self.norm.weight * (t / (1 + t.abs())) + self.norm.bias
        else:
            q = self.norm(q)
        return torch.cat((x, q), dim=1)


def main() -> None:
    torch.manual_seed(0)
    for channels, cs, side, norm in BLOCKS:
        print(f"{channels} channels, Cs {cs}, {side}x{side}, {norm}, batch {BATCH}")
        fused = ACH(channels, cs, norm)
        modules: dict[str, ACH] = {
            "fused": fused,
            "indexed": IndexedACH(channels, cs, norm),
            "one-hot": OneHotACH(channels, cs, norm),
        }
        for module in modules.values():
            module.load_state_dict(fused.state_dict())
        _compare("whole ACH", modules, torch.randn(BATCH, channels, side, side), fused.out_channels)
        products: dict[str, Callable[[Tensor], Tensor]] = {"fused": cross_hadamard, "indexed": _indexed}
        _compare("products", products, torch.randn(BATCH, cs, side, side), cs * (cs - 1) // 2)


def _indexed(z: Tensor) -> Tensor:
    i, j = pair_indices(z.shape[1])
    return z[:, i] * z[:, j]


def _compare(title: str, forms: Mapping[str, Callable[[Tensor], Tensor]], inputs: Tensor, out_channels: int) -> None:
    # Given, not made by a loss: a loss over the output would be timed with all.
    gradient = torch.randn(len(inputs), out_channels, *inputs.shape[2:])
    times: dict[str, list[float]] = {name: [] for name in forms}
    for index in range(ROUNDS + WARMUP):
        for name, form in forms.items():
            seconds = _time(form, inputs.clone().requires_grad_(), gradient)
            if index >= WARMUP:
                times[name].append(seconds)
    for name, form in forms.items():
        ratio = statistics.median(b / a for a, b in zip(times["fused"], times[name], strict=True))
        kept = _kept(form, inputs.clone().requires_grad_()) / 2**20
        milliseconds = [1e3 * value for value in (statistics.median(times[name]), min(times[name]))]
        print(
            f"  {title}, {name:8} median {milliseconds[0]:7.2f} ms, best {milliseconds[1]:7.2f} ms,"
            f" {ratio:5.2f} of fused, keeps {kept:6.1f} MiB for the gradient"
        )


def _kept(form: Callable[[Tensor], Tensor], inputs: Tensor) -> int:
    """Return the bytes that `form` keeps between its forward and its backward pass."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = form(inputs)
    del out
    return sum(storages.values())


def _time(module: Callable[[Tensor], Tensor], inputs: Tensor, gradient: Tensor) -> float:
    start = time.perf_counter()
    module(inputs).backward(gradient)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
