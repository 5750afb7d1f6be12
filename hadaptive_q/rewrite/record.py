"""Run a graph and keep some of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node


class Recorder(Interpreter):
    """Run a graph once and keep the tensors whose node names are asked for; what is read is `forced` where it is."""

    def __init__(self, graph: GraphModule, names: set[str], forced: Mapping[str, Tensor]) -> None:
        super().__init__(graph)
        # An error of the graph is passed on as it was raised.
        self.extra_traceback = False
        self.names, self.forced, self.values = names, forced, dict[str, Tensor]()

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.name in self.names and isinstance(result, Tensor):
            self.values[n.name] = result
        return self.forced.get(n.name, result)


def record(
    graph: GraphModule, inputs: Tensor, names: set[str], forced: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the tensors made by the nodes `names` on `inputs`.

    The readers of a node in `forced` get that tensor instead of the one it makes.
    """
    recorder = Recorder(graph, names, forced or {})
    with torch.no_grad():
        recorder.run(inputs)
    return recorder.values
