"""Let the delegate take an image of bytes.

The stock XNNPACK runtime knows unsigned 8-bit values and turns them into int8 through a table of 256 entries; only the
ahead-of-time part writes every 8-bit value down as signed. Two additions make up for it, and the unmodified runtime
runs the file: a partitioner configuration that lets a dequantize operator read uint8, and a node visitor that gives
such an input its true type. The quantize operator behind it then becomes the conversion.
"""

from __future__ import annotations

from typing import Any

import torch
from executorch.backends.xnnpack.operators.node_visitor import register_node_visitor
from executorch.backends.xnnpack.operators.op_quant_dequant import OpStaticQDQNode
from executorch.backends.xnnpack.operators.quant_params import QuantParams
from executorch.backends.xnnpack.partition.config.generic_node_configs import DeQuantizedPerTensorConfig
from executorch.backends.xnnpack.serialization.xnnpack_graph_schema import XNNDatatype, XNNGraph
from executorch.backends.xnnpack.utils.quant_utils import is_quant
from torch.export import ExportedProgram
from torch.fx import Node

TARGET = "quantized_decomposed.dequantize_per_tensor.default"
# Registering a visitor takes its name away: it is found among the subclasses of its base.
_Stock: Any = next(visitor for visitor in OpStaticQDQNode.__subclasses__() if visitor.target == TARGET)


class Uint8DequantizeConfig(DeQuantizedPerTensorConfig):  # type: ignore[misc]
    """Dequantize from int8, or from uint8 where quantize operators are all that reads the result."""

    def check_constraints(self, node: Node, ep: ExportedProgram) -> bool:
        if _reads_bytes(node):
            return all(is_quant(reader) for reader in node.users)
        allowed: bool = super().check_constraints(node, ep)
        return allowed


class Uint8DequantizeVisitor(_Stock):  # type: ignore[misc]
    """Define a uint8 input and let its readers convert from it; anything else is the library's own."""

    def define_node(self, node: Node, xnn_graph: XNNGraph, vals_to_ids: dict[Node, int], debug_handle: int) -> None:
        if not _reads_bytes(node):
            super().define_node(node, xnn_graph, vals_to_ids, debug_handle)
            return
        (image,) = node.all_input_nodes
        self.define_tensor(image, xnn_graph, vals_to_ids, quant_params=QuantParams.from_q_dq_node(node))
        vals_to_ids[node] = vals_to_ids[image]

    def get_serialized_dtype(self, quant_params: QuantParams | None, node: Node, force_fp32: bool = False) -> Any:
        if quant_params is not None and quant_params.dtype == torch.uint8:
            return XNNDatatype.xnn_datatype_quint8
        return super().get_serialized_dtype(quant_params, node, force_fp32)


register_node_visitor(Uint8DequantizeVisitor)


def _reads_bytes(node: Node) -> bool:
    return node.args[-1] == torch.uint8
