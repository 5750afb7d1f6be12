"""Spare the ahead-of-time compiler what changes nothing: nearly half of the time it takes.

Some twenty of its passes trace the whole graph again when they are done, whether they have edited it or not, and every
trace copies the history of every node, which the trace before made longer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any

from executorch.exir.pass_base import ExportPass
from torch.fx import Graph, GraphModule
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.traceback import NodeSource

# What a trace is made of: a pass that has its own of any of these edits the graph while it traces it.
_STEPS = [
    name for name in dir(ExportPass) if name != "call" and callable(getattr(ExportPass, name)) and name[:2] != "__"
]


@contextmanager
def without_idle_work() -> Iterator[None]:
    """Let passes keep a graph that is as the last trace left it, and nodes of one origin share its history."""
    traced: dict[Graph, _State] = {}
    trace = ExportPass.call

    def call(self: Any, module: GraphModule) -> PassResult:
        before = traced.get(module.graph)
        if before and _only_traces(type(self)) and before.same(_State(module.graph)):
            return PassResult(module, True)
        result: PassResult = trace(self, module)
        traced[result.graph_module.graph] = _State(result.graph_module.graph)
        return result

    ExportPass.call = call
    # Nothing edits a history once it is written.
    NodeSource.__deepcopy__ = lambda self, _: self  # type: ignore[attr-defined]
    try:
        yield
    finally:
        ExportPass.call = trace
        del NodeSource.__deepcopy__  # type: ignore[attr-defined]


class _State:
    """What a graph says and the very examples that its last trace gave to its nodes; passes edit a graph in place."""

    def __init__(self, graph: Graph) -> None:
        self.calls = [(node, node.op, node.target, node.args, node.kwargs) for node in graph.nodes]
        self.examples = [node.meta.get("val") for node in graph.nodes]

    def same(self, other: _State) -> bool:
        return self.calls == other.calls and all(map(is_, self.examples, other.examples))


def _only_traces(kind: type) -> bool:
    return all(getattr(kind, name) is getattr(ExportPass, name) for name in _STEPS)
