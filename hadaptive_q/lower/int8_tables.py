"""Let element-wise functions be int8 inside the delegate: as tables of 256 entries.

The stock XNNPACK runtime runs an element-wise function from int8 to int8 as a table; only the ahead-of-time partitioner
takes these functions as float only. Configurations that also offer the static quantized pattern are all that is
missing, and the unmodified runtime runs the file. Another function is one more entry.
"""

from __future__ import annotations

from typing import Any

from executorch.backends.xnnpack.partition.config.generic_node_configs import (
    GeluConfig,
    HardswishConfig,
    SigmoidConfig,
    TanhConfig,
)
from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType


def _also_int8(config: Any) -> Any:
    """Return `config`, that of a function in float, with its form between a dequantize and a quantize operator."""

    class Int8Config(config):  # type: ignore[misc]
        def supported_precision_types(self) -> list[ConfigPrecisionType]:
            return [ConfigPrecisionType.FP32, ConfigPrecisionType.STATIC_QUANT]

    return Int8Config


# In the place of the stock partitioner's configurations.
TABLES = {config: _also_int8(config) for config in (HardswishConfig, SigmoidConfig, TanhConfig, GeluConfig)}
