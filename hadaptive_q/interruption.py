"""A run that ends before its time: in one line, what became of it and how to go on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from hadaptive_q.errors import UserError

Result = TypeVar("Result")
# What a run leaves for the next one, in the order of its steps.
KEPT = ("float.state", "float.safetensors", "float.json", "qat.state")


def resumable(step: Callable[[], Result], folder: Path) -> Result:
    """Return ``step()``, which trains into `folder`.

    Interrupted by Ctrl-C, it says what is kept and ends the process with code 130. Raises UserError where a training
    diverges.
    """
    try:
        return step()
    except KeyboardInterrupt:
        kept = ", ".join(name for name in KEPT if (folder / name).is_file()) or "nothing yet"
        print(f"hadaptive-q: interrupted; {folder} keeps {kept}; the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    except FloatingPointError as error:
        raise UserError(
            "training", str(error), "a finite loss", "lower the learning rate: --set float.lr=... or fit.lr=..."
        ) from error
