"""The package's folder in the user's cache: what can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder, below `$XDG_CACHE_HOME` or `~/.cache`, whether it exists or not."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hadaptive-q"
