"""Give every reader of a quantized tensor a dequantize operator of its own.

XNNPACK's layout pass moves *all* readers of a shared dequantize to the layout that one of them needs; the
others then compute on a transposed tensor (a mean over the wrong axes, found as a shape error at run time).
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from hadaptive_q.rewrite.graph import calls, finish


def split_dequantize(graph: GraphModule) -> int:
    """Split every shared dequantize in place and return how many were added."""
    # Looked up late: the operator exists once a quantization library has registered it.
    dequantize = torch.ops.quantized_decomposed.dequantize_per_tensor.default
    added = 0
    for node in calls(graph, dequantize):
        for user in list(node.users)[1:]:
            with graph.graph.inserting_before(user):
                own = graph.graph.call_function(dequantize, node.args, dict(node.kwargs))
            own.meta = dict(node.meta)
            user.replace_input_with(node, own)
            added += 1
    finish(graph)
    return added
