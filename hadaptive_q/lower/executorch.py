"""Lower a quantized program, or the float network, to a `.pte` for ExecuTorch with XNNPACK."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
from executorch.backends.xnnpack.partition.config.generic_node_configs import DeQuantizedPerTensorConfig
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import ExecutorchProgramManager, to_edge_transform_and_lower
from executorch.exir._serialize._named_data_store import NamedDataStore
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from hadaptive_q.lower.coverage import Coverage, measure_coverage
from hadaptive_q.lower.delegate import Delegate, kept_graphs, write_delegate
from hadaptive_q.lower.fused_clamps import CLAMPED
from hadaptive_q.lower.idle_work import without_idle_work
from hadaptive_q.lower.int8_tables import TABLES
from hadaptive_q.lower.pointwise_int4 import mark_four_bits
from hadaptive_q.lower.quiet import quiet
from hadaptive_q.lower.tidy_delegate import tidy_delegate
from hadaptive_q.lower.uint8_input import Uint8DequantizeConfig

# The stock partitioner's configurations, with ours in the place of those they extend.
_OURS = {**TABLES, **CLAMPED, DeQuantizedPerTensorConfig: Uint8DequantizeConfig}
_CONFIGS = [_OURS.get(config, config) for config in ALL_PARTITIONER_CONFIGS]


@dataclass(frozen=True)
class Lowered:
    """The bytes of a `.pte` and what became of its operators."""

    data: bytes
    coverage: Coverage


def lower(program: ExportedProgram) -> Lowered:
    """Return `program` as a `.pte` for any CPU with the stock ExecuTorch runtime."""
    mark_four_bits(program)
    delegates: list[Delegate] = []

    def tidied(graph: GraphModule) -> PassResult:
        """Tidy every delegate, as a pass over the program's graph, which stays as it is."""
        delegates[:] = [
            _tidy(module, graphs) for module in graph.children() if isinstance(module, LoweredBackendModule)
        ]
        return PassResult(graph, True)

    with quiet("executorch", "torch.export", "root"), without_idle_work():
        with kept_graphs() as graphs:
            edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner(configs=_CONFIGS)])
        manager: ExecutorchProgramManager = edge.transform([tidied]).to_executorch()
    return Lowered(bytes(manager.buffer), measure_coverage(manager.exported_program(), delegates))


def _tidy(module: LoweredBackendModule, graphs: Mapping[bytes, Any]) -> Delegate:
    """Put the tidied delegate in the place of the one that `module` was compiled to, and return it."""
    kept = module.named_data_store_output
    named = {name: kept.buffers[entry.buffer_index] for name, entry in kept.pte_data.items()}
    # Delegates of equal bytes were compiled from graphs of their own.
    delegate = Delegate(copy.deepcopy(graphs[module.processed_bytes]), named)
    tidy_delegate(delegate)
    payload, outside = write_delegate(delegate)
    store = NamedDataStore()
    for name, data in outside.items():
        store.add_named_data(name, data, alignment=kept.pte_data[name].alignment)
    module._processed_bytes = payload
    module._named_data_store_output = store.get_named_data_store_output()
    return delegate
