"""Remove operators that do nothing at inference: dropout, and copies that only keep autograd happy."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from hadaptive_q.rewrite.graph import aten, calls, finish

_NO_OPS = (aten.dropout.default, aten.alias.default, aten.detach.default)


def drop_no_ops(graph: GraphModule) -> int:
    """Remove them in place and return how many there were."""
    count = 0
    for node in calls(graph, *_NO_OPS):
        source = node.args[0]
        assert isinstance(source, Node)
        node.replace_all_uses_with(source)
        graph.graph.erase_node(node)  # dead code elimination keeps what may draw random numbers
        count += 1
    finish(graph)
    return count
