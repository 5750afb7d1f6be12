"""Store 4-bit weights as 4 bits, and let 1x1 convolutions have them.

XNNPACK runs int8 activations against weights of 4 bits per channel in its Fully Connected operator only. The
ahead-of-time code writes them, but lets a 1x1 convolution keep its own operator, and no runtime loads that file. Over
NHWC a 1x1 convolution is a Fully Connected of every pixel: another name for the same node, no tensor is moved.
"""

from __future__ import annotations

import torch
from executorch.backends.xnnpack.operators.node_visitor import get_node_visitors, register_node_visitor
from executorch.backends.xnnpack.serialization.xnnpack_graph_schema import (
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
        weight = node.args[1]
        assert isinstance(weight, Node)
        packed = tuple(weight.args[4:6]) == _BOUNDS
        if packed and not _is_pointwise(node, weight.meta["val"].shape):
            raise ValueError(f"{node}: 4-bit weights of a convolution that is not {POINTWISE}")
        super().define_node(node, xnn_graph, vals_to_ids, debug_handle)
        if not packed:
            return
        conv = xnn_graph.xnodes[-1].xnode_union
        values = [value.xvalue_union for value in xnn_graph.xvalues]
        tensors = [value.tensor_value for value in values if isinstance(value, XNNQuantizedTensorValue)]
        (filters,) = (tensor for tensor in tensors if tensor.id_out == conv.filter_id)
        filters.dims = [filters.dims[0], filters.dims[-1]]
        filters.num_dims = len(filters.dims)
        xnn_graph.xnodes[-1].xnode_union = XNNFullyConnected(
            input1_id=conv.input1_id,
            filter_id=conv.filter_id,
            bias_id=conv.bias_id,
            output_id=conv.output_id,
            flags=conv.flags,
        )


def _is_pointwise(conv: Node, shape: torch.Size) -> bool:
    stride, padding, _, transposed, _, groups = conv.args[3:9]
    return (*shape[2:], *stride, groups) == (1,) * 5 and not any(padding) and not transposed  # type: ignore[misc, arg-type]


register_node_visitor(PointwiseVisitor)
