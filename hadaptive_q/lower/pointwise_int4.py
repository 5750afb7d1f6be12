"""Store 4-bit weights as 4 bits, and let 1x1 convolutions have them.

XNNPACK runs int8 activations against weights of 4 bits per channel in its Fully Connected operator only. The
ahead-of-time code writes them, but lets a 1x1 convolution keep its own operator, and no runtime loads that file. Over
NHWC a 1x1 convolution is a Fully Connected of every pixel: another name for the same node, no tensor is moved.
"""

from __future__ import annotations

import torch
from executorch.backends.xnnpack.operators.node_visitor import get_node_visitors, register_node_visitor
from executorch.backends.xnnpack.serialization.xnnpack_graph_schema import (
    XNNConv2d,
    XNNDatatype,
    XNNFullyConnected,
    XNNGraph,
    XNNQuantizedTensorValue,
)
from torch.export import ExportedProgram
from torch.fx import Node

from hadaptive_q.quant.formats import POINTWISE, WeightFormat

_CONVOLUTION = "aten.convolution.default"
# By these bounds, and no others, the ahead-of-time code knows weights of 4 bits.
_BOUNDS = (-8, 7)
# The registry takes a class's name away when it files it.
_Convolution: type = type(get_node_visitors(None, {}, None)[_CONVOLUTION])


def mark_four_bits(program: ExportedProgram) -> None:
    """Give the dequantize operators of 4-bit weights in `program` the bounds that have them packed (in place).

    Codes and scales stay: the bounds of a dequantize operator are no part of its arithmetic.
    """
    for node in program.graph.nodes:
        if node.target == torch.ops.quantized_decomposed.dequantize_per_channel.default:
            codes, scale, zero_point, axis, low, high, dtype = node.args
            if (low, high) == WeightFormat(4).code_range:
                node.args = (codes, scale, zero_point, axis, *_BOUNDS, dtype)


class PointwiseVisitor(_Convolution):  # type: ignore[misc]
    """Write a convolution of 4-bit weights as the Fully Connected it is.

    Raises ValueError for one that is not 1x1, with stride 1, without padding and in one group.
    """

    target = _CONVOLUTION

    def define_node(self, node: Node, xnn_graph: XNNGraph, vals_to_ids: dict[Node, int], debug_handle: int) -> None:
        super().define_node(node, xnn_graph, vals_to_ids, debug_handle)
        written = xnn_graph.xnodes[-1]
        conv = written.xnode_union
        weight = next(v for v in (value.xvalue_union for value in xnn_graph.xvalues) if _id(v) == conv.filter_id)
        if not isinstance(weight, XNNQuantizedTensorValue):
            return
        tensor = weight.tensor_value
        if tensor.datatype != XNNDatatype.xnn_datatype_qcint4:
            return
        if not isinstance(conv, XNNConv2d) or not _is_pointwise(conv):
            raise ValueError(f"{node}: 4-bit weights {tensor.dims} of a convolution that is not {POINTWISE}")
        tensor.dims = [tensor.dims[0], tensor.dims[-1]]
        tensor.num_dims = len(tensor.dims)
        written.xnode_union = XNNFullyConnected(
            input1_id=conv.input1_id,
            filter_id=conv.filter_id,
            bias_id=conv.bias_id,
            output_id=conv.output_id,
            flags=conv.flags,
        )


def _id(value: object) -> int:
    tensor = value.tensor_value if isinstance(value, XNNQuantizedTensorValue) else value
    found: int = tensor.id_out  # type: ignore[attr-defined]
    return found


def _is_pointwise(conv: XNNConv2d) -> bool:
    padding = (conv.padding_top, conv.padding_right, conv.padding_bottom, conv.padding_left)
    steps = (conv.kernel_height, conv.kernel_width, conv.subsampling_height, conv.subsampling_width, conv.groups)
    return not any(padding) and all(step == 1 for step in steps)


register_node_visitor(PointwiseVisitor)
