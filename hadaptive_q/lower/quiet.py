"""Keep to itself what a third party's compiler logs and warns about on its way: nothing the user can act on."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Suppress Python warnings, and whatever the loggers of these names and below them say short of an error."""
    names = [name for name in logging.root.manager.loggerDict if _within(name, loggers)]
    found = [logging.getLogger(name) for name in {*names, *loggers}]
    levels = [logger.level for logger in found]
    for logger in found:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(found, levels, strict=True):
            logger.setLevel(level)


def _within(name: str, parents: tuple[str, ...]) -> bool:
    return any(f"{name}.".startswith(f"{parent}.") for parent in parents)
