"""A run that ends before its time: in one line, what became of it and how to go on."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TypeVar

from rich.console import Console

from hadaptive_q.atomic import clear, holds
from hadaptive_q.errors import UserError

Result = TypeVar("Result")
# What a run leaves for the next one, in the order of its steps.
KEPT = ("float.state", "float.safetensors", "float.json", "qat.state")


def resumable(step: Callable[[], Result], folder: Path) -> Result:
    """Return ``step()``, which trains into `folder`.

    Interrupted by Ctrl-C, it says what is kept and ends the process with code 130. Raises UserError where a training
    diverges.
    """
    with _ended_by_interrupt(folder):
        try:
            return step()
        except FloatingPointError as error:
            raise UserError(
                "training", str(error), "a finite loss", "lower the learning rate: --set float.lr=... or fit.lr=..."
            ) from error


@contextmanager
def _ended_by_interrupt(folder: Path) -> Iterator[None]:
    def end(*_: object) -> NoReturn:
        # Not by an exception: where torch's tracer calls Python from C++ that cannot unwind, one aborts the process.
        # Where a step makes run after run in folders of their own, the one at work keeps something.
        inner = next(filter(holds, folder.glob("*/")), folder)
        for held in (inner, folder):
            clear(held)
        Console(stderr=True).show_cursor()  # a progress bar hides it
        line = "\n" if sys.stderr.isatty() else ""  # behind that bar
        kept = ", ".join(name for name in KEPT if (inner / name).is_file()) or "nothing yet"
        line += f"hadaptive-q: interrupted; {inner} keeps {kept}; the same command goes on from there"
        print(line, file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(130)

    before = signal.getsignal(signal.SIGINT)
    if before != signal.SIG_IGN:  # a job in the background is not meant to hear it
        signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
