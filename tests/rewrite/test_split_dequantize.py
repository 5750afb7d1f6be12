from __future__ import annotations

import pytest
import torch
import torchao.quantization.pt2e.quantize_pt2e  # noqa: F401 -- registers the operators
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from hadaptive_q.rewrite.graph import calls, finish, trace
from hadaptive_q.rewrite.split_dequantize import split_dequantize

Q = torch.ops.quantized_decomposed
SETTINGS = (0.1, 3, -128, 127, torch.int8)


class Readers(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        y = x.neg()
        return sum((torch.relu(y) * k for k in range(1, self.count)), y.abs())


def quantized(count: int) -> GraphModule:
    """A graph whose negated input is stored in int8 and read `count` times through one dequantize."""
    graph = trace(Readers(count), 8)
    (negated,) = calls(graph, torch.ops.aten.neg.default)
    readers = list(negated.users)
    assert len(readers) == count
    with graph.graph.inserting_after(negated):
        q = graph.graph.call_function(Q.quantize_per_tensor.default, (negated, *SETTINGS))
    with graph.graph.inserting_after(q):
        dq = graph.graph.call_function(Q.dequantize_per_tensor.default, (q, *SETTINGS))
    for reader in readers:
        reader.replace_input_with(negated, dq)
    finish(graph)
    return graph


def dequantizes(graph: GraphModule) -> list[Node]:
    return list(calls(graph, Q.dequantize_per_tensor.default))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_reader_gets_its_own(count: int) -> None:
    graph = quantized(count)
    x = torch.randn(2, 3, 8, 8)
    wanted = graph(x)
    assert split_dequantize(graph) == count - 1
    assert [len(node.users) for node in dequantizes(graph)] == [1] * count
    assert {node.args[1:] for node in dequantizes(graph)} == {SETTINGS}
    assert len(list(calls(graph, Q.quantize_per_tensor.default))) == 1, "stored once"
    assert torch.equal(graph(x), wanted)
    assert split_dequantize(graph) == 0


def test_one_reader_of_both_sides_keeps_one() -> None:
    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.neg()
            return y * y

    graph = trace(Square(), 8)
    (negated,) = calls(graph, torch.ops.aten.neg.default)
    (square,) = negated.users
    with graph.graph.inserting_before(square):
        q = graph.graph.call_function(Q.quantize_per_tensor.default, (negated, *SETTINGS))
        dq = graph.graph.call_function(Q.dequantize_per_tensor.default, (q, *SETTINGS))
    square.replace_input_with(negated, dq)
    finish(graph)
    assert split_dequantize(graph) == 0
    assert [len(node.users) for node in dequantizes(graph)] == [1]
