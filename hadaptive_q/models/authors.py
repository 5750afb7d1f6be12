"""The authors' training checkpoints, read as data, in the layout of any family.

Only tensors and plain containers are unpickled (``weights_only``); nothing in the file executes. The command-line
arguments that some keep beside their tensors come as the plain namespace they are.
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from hadaptive_q.errors import UserError, first_line
from hadaptive_q.models.config import FAMILIES, NetworkConfig
from hadaptive_q.models.families import find_family

# What `torch.load` raises for a damaged or foreign file.
_UNREADABLE = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, OSError),
    *(ValueError, LookupError, AttributeError, TypeError),
)


def read_authors(path: Path) -> tuple[NetworkConfig, dict[str, Tensor]]:
    """Return the configuration and the renamed tensors of the authors' checkpoint at `path`.

    Raises UserError for a foreign, truncated or code-carrying file.
    """
    where = f"checkpoint {path}"
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        reason = first_line(error)[:120]
        raise UserError(where, f"'{reason}'", "a checkpoint of tensors and plain containers") from error
    layouts = [layout for family in FAMILIES if (layout := find_family(family).layout)]
    for layout in layouts:
        if isinstance(content, Mapping) and layout.fits(content):
            return layout.read(content, where)
    raise UserError(where, "a foreign layout", " or ".join(layout.expected for layout in layouts))
