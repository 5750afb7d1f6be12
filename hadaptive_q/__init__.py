"""Quantize and compress Hadaptive-Net for ARM phones, and measure the file that ships."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hadaptive_q.models.checkpoint import load_model, save_model
    from hadaptive_q.models.families import create_model
    from hadaptive_q.models.hadaptive_net import HadaptiveNet
    from hadaptive_q.models.network import Network
    from hadaptive_q.share import from_pretrained, push_to_hub, save_pretrained

__version__ = "0.1.0"
__all__ = [
    "HadaptiveNet",
    "Network",
    "create_model",
    "from_pretrained",
    "load_model",
    "push_to_hub",
    "save_model",
    "save_pretrained",
]

_HOME = {
    "HadaptiveNet": "models.hadaptive_net",
    "Network": "models.network",
    "create_model": "models.families",
    "from_pretrained": "share",
    "load_model": "models.checkpoint",
    "push_to_hub": "share",
    "save_model": "models.checkpoint",
    "save_pretrained": "share",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that `hadaptive-q --help` and recipe errors answer without loading torch.
    if name not in _HOME:
        raise AttributeError(f"module 'hadaptive_q' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"hadaptive_q.{_HOME[name]}"), name)
