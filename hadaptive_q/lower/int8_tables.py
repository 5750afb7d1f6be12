"""Let element-wise functions be int8 inside the delegate: as tables of 256 entries.

The stock XNNPACK runtime runs an element-wise function from int8 to int8 as a table; only the ahead-of-time partitioner
takes these functions as float only. Configurations that also offer the static quantized pattern are all that is
missing, and the unmodified runtime runs the file. Another function is one more class and one more entry.
"""

from __future__ import annotations

from executorch.backends.xnnpack.partition.config.generic_node_configs import (
    GeluConfig,
    HardswishConfig,
    SigmoidConfig,
    TanhConfig,
)
from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType

_PRECISIONS = [ConfigPrecisionType.FP32, ConfigPrecisionType.STATIC_QUANT]


class Int8HardswishConfig(HardswishConfig):  # type: ignore[misc]
    """Hardswish in float, or between a dequantize and a quantize operator in int8."""

    def supported_precision_types(self) -> list[ConfigPrecisionType]:
        return _PRECISIONS


class Int8SigmoidConfig(SigmoidConfig):  # type: ignore[misc]
    """Sigmoid, likewise."""

    def supported_precision_types(self) -> list[ConfigPrecisionType]:
        return _PRECISIONS


class Int8TanhConfig(TanhConfig):  # type: ignore[misc]
    """Tanh, likewise."""

    def supported_precision_types(self) -> list[ConfigPrecisionType]:
        return _PRECISIONS


class Int8GeluConfig(GeluConfig):  # type: ignore[misc]
    """GELU, likewise."""

    def supported_precision_types(self) -> list[ConfigPrecisionType]:
        return _PRECISIONS


# In the place of the stock partitioner's configurations.
TABLES = {
    HardswishConfig: Int8HardswishConfig,
    SigmoidConfig: Int8SigmoidConfig,
    TanhConfig: Int8TanhConfig,
    GeluConfig: Int8GeluConfig,
}
