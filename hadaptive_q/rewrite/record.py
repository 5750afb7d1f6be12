"""Run a graph and keep some of its tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node


class Recorder(Interpreter):
    """Run a graph once and keep the tensors whose node names are asked for."""

    def __init__(self, graph: GraphModule, names: set[str]) -> None:
        super().__init__(graph)
        # An error of the graph is passed on as it was raised.
        self.extra_traceback = False
        self.names, self.values = names, dict[str, Tensor]()

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.name in self.names and isinstance(result, Tensor):
            self.values[n.name] = result
        return result


def record(graph: GraphModule, inputs: Tensor, names: set[str]) -> dict[str, Tensor]:
    """Return the tensors made by the nodes `names` on `inputs`."""
    recorder = Recorder(graph, names)
    with torch.no_grad():
        recorder.run(inputs)
    return recorder.values
