"""Let additions and multiplications in int8 clamp what they store, as layers do.

The runtime takes a clamp behind any of them in; only the ahead-of-time partitioner knows it of layers, and of a ReLU
behind an addition. Configurations that name the clamps are all that is missing, and the unmodified runtime runs the
file.
"""

from __future__ import annotations

from typing import Any

from executorch.backends.xnnpack.partition.config.generic_node_configs import AddConfig, MulConfig

_CLAMPS = ["relu.default", "hardtanh.default"]


def _also_clamped(config: Any) -> Any:
    """Return `config`, that of an operator of two tensors, with a clamp between it and its quantize operator."""

    class ClampedConfig(config):  # type: ignore[misc]
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            self.fused_acts = _CLAMPS

    return ClampedConfig


# In the place of the stock partitioner's configurations.
CLAMPED = {config: _also_clamped(config) for config in (AddConfig, MulConfig)}
