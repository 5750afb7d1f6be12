"""Let Hardswish be int8 inside the delegate.

The stock XNNPACK runtime runs int8 Hardswish as a table of 256 entries; only the ahead-of-time partitioner takes it as
float only. A configuration that also offers the static quantized pattern is all that is missing, and the unmodified
runtime runs the file.
"""

from __future__ import annotations

from executorch.backends.xnnpack.partition.config.generic_node_configs import HardswishConfig
from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType


class Int8HardswishConfig(HardswishConfig):  # type: ignore[misc]
    """Hardswish in float, or between a dequantize and a quantize operator in int8."""

    def supported_precision_types(self) -> list[ConfigPrecisionType]:
        return [ConfigPrecisionType.FP32, ConfigPrecisionType.STATIC_QUANT]
