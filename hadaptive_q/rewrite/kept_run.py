"""Run a graph once, keep its values, and run again only what a change affects."""

from __future__ import annotations

from collections.abc import Sequence, Set

from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

PIXELS = 64 * 64 * 64  # of a batch: every value it makes on its way through the graph is kept in memory


def kept_batches(inputs: Tensor) -> Sequence[Tensor]:
    """Split network inputs `(N, C, H, W)` into batches whose every value fits into memory."""
    found: tuple[Tensor, ...] = inputs.split(max(1, PIXELS // inputs[0, 0].numel()))
    return found


class KeptRun(Interpreter):
    """One run whose values are kept, so that a change costs only what lies behind it."""

    def __init__(self, graph: GraphModule, inputs: Tensor) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.inputs = inputs
        self.logits: Tensor = self.run(inputs)
        self.kept = dict(self.env)

    def again(self, changed: Sequence[Node], held: Set[Node] = frozenset()) -> Tensor:
        """Return the logits with `changed` and everything behind it computed anew, up to what is `held`."""
        behind = set(changed)
        todo = list(changed)
        while todo:
            users = [user for user in todo.pop().users if user not in behind and user not in held]
            behind.update(users)
            todo += users
        out: Tensor = self.run(self.inputs, initial_env={n: v for n, v in self.kept.items() if n not in behind})
        return out
