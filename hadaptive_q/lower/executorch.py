"""Lower a quantized program, or the float network, to a `.pte` for ExecuTorch with XNNPACK."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass

from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
from executorch.backends.xnnpack.partition.config.generic_node_configs import HardswishConfig
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import ExecutorchProgramManager, to_edge_transform_and_lower
from torch.export import ExportedProgram

from hadaptive_q.lower.coverage import Coverage, measure_coverage
from hadaptive_q.lower.hardswish_int8 import Int8HardswishConfig
from hadaptive_q.lower.pointwise_int4 import mark_four_bits

# The stock partitioner's configurations, with ours in the place of those they extend.
_CONFIGS = [Int8HardswishConfig if c is HardswishConfig else c for c in ALL_PARTITIONER_CONFIGS]


@dataclass(frozen=True)
class Lowered:
    """The bytes of a `.pte` and what became of its operators."""

    data: bytes
    coverage: Coverage


def lower(program: ExportedProgram) -> Lowered:
    """Return `program` as a `.pte` for any CPU with the stock ExecuTorch runtime."""
    mark_four_bits(program)
    with warnings.catch_warnings(), _quiet("executorch", "torch.export", "root"):
        # The lowering of a third party warns about its own deprecated calls; nothing the user can act on.
        warnings.simplefilter("ignore")
        edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner(configs=_CONFIGS)])
        manager: ExecutorchProgramManager = edge.to_executorch()
    return Lowered(bytes(manager.buffer), measure_coverage(manager.exported_program()))


class _quiet:
    """Raise the level of some loggers to errors for a while."""

    def __init__(self, *names: str) -> None:
        self.loggers = [logging.getLogger(name) for name in names]

    def __enter__(self) -> None:
        self.levels = [logger.level for logger in self.loggers]
        for logger in self.loggers:
            logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        for logger, level in zip(self.loggers, self.levels, strict=True):
            logger.setLevel(level)
