"""What a run says on standard error while it works. The library itself only logs, under `hadaptive_q`."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def shown(quiet: bool) -> Iterator[None]:
    """Show steps and notes with the seconds since now, and the bars of trainings; where `quiet`, nothing but errors."""
    logger = logging.getLogger("hadaptive_q")
    handler = logging.StreamHandler()
    handler.setFormatter(_Seconds())
    before = logger.level
    logger.setLevel(logging.ERROR if quiet else logging.INFO)
    logger.addHandler(handler)
    logger.propagate = False  # libraries give the root logger a handler, which would say everything again
    try:
        yield
    finally:
        logger.propagate = True
        logger.removeHandler(handler)
        logger.setLevel(before)


class _Seconds(logging.Formatter):
    def __init__(self) -> None:
        super().__init__()
        self._start = time.time()

    def format(self, record: logging.LogRecord) -> str:
        return f"{record.created - self._start:7.1f} s  {record.getMessage()}"
