"""The state of an unfinished training, written in one step after every epoch."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from hadaptive_q.atomic import write_bytes
from hadaptive_q.errors import UserError

# What `torch.load` raises for a damaged or foreign file.
_UNREADABLE = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, OSError),
    *(ValueError, LookupError, AttributeError, TypeError),
)


def save_state(path: Path, key: str, state: dict[str, Any]) -> None:
    """Write `state`, marked with `key`: what the training is made of, so that another one does not continue it."""
    # In memory first: what torch raises when a disk is full does not say so.
    content = io.BytesIO()
    torch.save({"key": key, **state}, content)
    write_bytes(path, content.getvalue())


def load_state(path: Path, key: str) -> dict[str, Any] | None:
    """Return the state at `path`, or None where there is none or it belongs to another training.

    Only tensors and plain containers are read. Raises UserError for a damaged file.
    """
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise UserError(
            str(path), "a damaged training state", "the state of an interrupted run", "delete it"
        ) from error
    return state if isinstance(state, dict) and state.get("key") == key else None
