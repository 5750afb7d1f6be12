"""BatchNorm over the whole batch of all processes, as one process would normalise it.

Each process contributes mean and variance of its own samples, equally many everywhere:
``mean = avg(m_r)``, ``var = avg(v_r + (m_r - mean)^2)``, with gradients through both to the samples of all processes.
torch's SyncBatchNorm does the same, on GPUs only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce

from hadaptive_q import processes
from hadaptive_q.train.together import join


@contextmanager
def synchronised(model: nn.Module) -> Iterator[None]:
    """Let every BatchNorm of `model` that trains see the whole batch until the end of the block."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)] if processes.count() > 1 else []
    join()
    for norm in norms:
        # On the instance: type, parameters and statistics stay those of the network.
        norm.forward = partial(_forward, norm)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _forward(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    if not norm.training:
        return type(norm).forward(norm, x)
    mean, var = _moments(x)
    samples = processes.count() * x.numel() // x.shape[1]
    with torch.no_grad():
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        assert norm.momentum is not None
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(var * (samples / max(1, samples - 1)), norm.momentum)
        norm.num_batches_tracked += 1
    scale = norm.weight * (var + norm.eps).rsqrt()
    shift = norm.bias - mean * scale
    return torch.addcmul(shift[:, None, None], x, scale[:, None, None]).to(x.dtype)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of every channel, `(C,)`, at least float32."""
    var, mean = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), (0, 2, 3), correction=0)
    # A row for each process, of which only the own one is filled: their sum is everybody's.
    rows = torch.nn.functional.pad(
        torch.stack((mean, var))[None], (0, 0, 0, 0, processes.index(), processes.count() - 1 - processes.index())
    )
    means, variances = all_reduce(rows, "sum", dist.distributed_c10d._get_default_group()).unbind(1)
    mean = means.mean(0)
    return mean, (variances + (means - mean).square()).mean(0)
