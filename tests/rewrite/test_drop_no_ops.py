from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from hadaptive_q.models.hadaptive_net import HadaptiveNet
from hadaptive_q.rewrite.drop_no_ops import drop_no_ops
from hadaptive_q.rewrite.graph import aten, calls, set_dropout, trace

NO_OPS = (aten.dropout.default, aten.alias.default, aten.detach.default)


def test_the_nano_network(nano: HadaptiveNet, nano_traced: GraphModule, inputs: Tensor) -> None:
    before = len(list(calls(nano_traced, *NO_OPS)))
    assert before == 1  # the head's dropout
    assert drop_no_ops(nano_traced) == before
    assert not list(calls(nano_traced, *NO_OPS))
    with torch.no_grad():
        assert torch.equal(nano_traced(inputs), nano(inputs)), "nothing was computed anew: equal to the last bit"


def test_dropout_left_active_goes_too(nano_traced: GraphModule, inputs: Tensor) -> None:
    set_dropout(nano_traced, active=True)
    with torch.no_grad():
        assert not torch.equal(nano_traced(inputs), nano_traced(inputs))
        drop_no_ops(nano_traced)
        assert torch.equal(nano_traced(inputs), nano_traced(inputs))


class Copies(nn.Module):
    """Chains of no-ops, one of them read twice and one of them the output."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.dropout(x * 2)).detach()
        return self.dropout(y + y.detach())


def test_chains_of_no_ops_vanish() -> None:
    graph = trace(Copies(), 8)
    count = len(list(calls(graph, *NO_OPS)))
    assert count >= 5
    assert drop_no_ops(graph) == count
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"] == [aten.mul.Tensor, aten.add.Tensor]
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(graph(x), 4 * x)


def test_a_graph_without_no_ops_stays_as_it_is() -> None:
    graph = trace(nn.Conv2d(3, 3, 1), 8)
    code = graph.code
    assert drop_no_ops(graph) == 0
    assert graph.code == code
