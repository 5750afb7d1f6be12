"""What was found out about a data set once and is kept for the next start, in the user's cache."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hadaptive_q.atomic import write_with
from hadaptive_q.cache import cache_folder
from hadaptive_q.errors import UserError

log = logging.getLogger(__name__)
Arrays = dict[str, np.ndarray]


def index_file(root: Path) -> Path:
    """Return where the index of the data set in `root` is kept."""
    return cache_folder() / f"index-{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]}.safetensors"


def keep(path: Path, arrays: Arrays, facts: dict[str, Any]) -> None:
    """Write `arrays` and `facts` (JSON) to `path`; a cache that takes nothing is no reason to stop."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_with(path, lambda temporary: save_file(arrays, temporary, {"facts": json.dumps(facts)}))
    except (OSError, UserError) as error:
        log.info("the index is not kept: %s", error)


def recall(path: Path) -> tuple[Arrays, dict[str, Any]] | None:
    """Return what `keep` wrote to `path`, None where there is nothing or nothing that can be read."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "numpy") as file:
            facts: dict[str, Any] = json.loads((file.metadata() or {})["facts"])
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        log.info("%s is damaged and made anew: %s", path, error)
        return None
