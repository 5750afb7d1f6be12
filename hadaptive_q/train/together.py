"""What processes that train together tell each other; with a single one, nothing happens.

One folder belongs to a run: the first process holds and fills it. The others work in scratch copies of what it keeps
for a run that goes on, so machines need no common disk, and every process decides alike.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor

from hadaptive_q import processes
from hadaptive_q.atomic import output_folder
from hadaptive_q.errors import UserError

Value = TypeVar("Value")
# The first process lowers and measures while the others wait; a process that died is the launcher's to notice.
PATIENCE = timedelta(hours=12)


def join() -> None:
    """Meet the other processes, once."""
    if processes.count() > 1:
        PartialState(cpu=on_cpu(), timeout=PATIENCE)


def on_cpu() -> bool:
    """Whether several processes train on the CPU, which accelerate wants to be told."""
    return processes.count() > 1 and not torch.cuda.is_available()


def from_first(make: Callable[[], Value]) -> Value:
    """Return on every process what ``make()`` returned, or the UserError it raised, on the first one."""
    if processes.count() == 1:
        return make()
    join()
    made: list[object] = [None, None]
    if processes.index() == 0:
        try:
            made[0] = make()
        except UserError as error:
            made[1] = error
    value, problem = broadcast_object_list(made)
    if isinstance(problem, UserError):
        raise problem
    return value  # type: ignore[no-any-return]


@contextmanager
def run_folder(path: Path, kept: Sequence[str]) -> Iterator[Path]:
    """Be the run's only writer in `path`; on other processes, a scratch folder with its files `kept`.

    Raises UserError as `atomic.output_folder` does.
    """
    if processes.index() == 0:
        with output_folder(path) as folder:
            from_first(lambda: {name: (folder / name).read_bytes() for name in kept if (folder / name).is_file()})
            yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        contents: dict[str, bytes] = from_first(dict)
        for name, content in contents.items():
            (Path(scratch) / name).write_bytes(content)
        yield Path(scratch)


@torch.no_grad()
def mean(x: Tensor) -> Tensor:
    """Return the mean of `x` over the processes, without a gradient."""
    if processes.count() == 1:
        return x.detach()
    join()
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / processes.count()


@torch.no_grad()
def extremes(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least `low` and the largest `high` over the processes."""
    if processes.count() == 1:
        return low, high
    join()
    ends = torch.stack((-low, high))
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    return -ends[0], ends[1]
