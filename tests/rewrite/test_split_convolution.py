"""A convolution whose result is cut becomes one convolution per part; what cannot be split stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hadaptive_q.rewrite.graph import aten, calls, constant, trace
from hadaptive_q.rewrite.split_convolution import split_convolution


class Cut(nn.Module):
    def __init__(self, cut: Callable[[Tensor], tuple[Tensor, ...]], bias: bool = True, groups: int = 1) -> None:
        super().__init__()
        self.conv, self.cut = nn.Conv2d(6, 10, 3, padding=1, bias=bias, groups=groups), cut

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = self.cut(self.conv(torch.cat((x, x), dim=1)))
        return torch.cat((first.relu(), *rest), dim=1)


CUTS = {
    "chunk": lambda y: y.chunk(3, dim=1),  # 4, 4 and 2
    "split": lambda y: y.split(4, dim=1),
    "split with sizes": lambda y: y.split((1, 7, 2), dim=1),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cut", CUTS)
def test_same_values(cut: str, bias: bool, assert_float_equal: Callable[[Tensor, Tensor], None]) -> None:
    torch.manual_seed(0)
    model, x = Cut(CUTS[cut], bias).eval(), torch.randn(2, 3, 8, 8)
    graph = trace(model, 8)
    assert split_convolution(graph) == 1
    with torch.no_grad():
        assert_float_equal(graph(x), model(x))
        sizes = [part.shape[1] for part in CUTS[cut](model.conv(torch.cat((x, x), dim=1)))]
    weights = [constant(graph, conv.args[1]) for conv in calls(graph, aten.conv2d.default)]
    assert [len(weight) for weight in weights if weight is not None] == sizes
    assert split_convolution(graph) == 0


def test_parts_that_nobody_reads_are_not_computed(assert_float_equal: Callable[[Tensor, Tensor], None]) -> None:
    class Some(Cut):
        def forward(self, x: Tensor) -> Tensor:
            return self.conv(torch.cat((x, x), dim=1)).chunk(5, dim=1)[3]

    model, x = Some(CUTS["chunk"]).eval(), torch.randn(2, 3, 8, 8)
    graph = trace(model, 8)
    assert split_convolution(graph) == 1
    assert len(list(calls(graph, aten.conv2d.default))) == 1
    with torch.no_grad():
        assert_float_equal(graph(x), model(x))


@pytest.mark.parametrize(
    "model",
    [
        Cut(CUTS["chunk"], groups=2),  # a part may lie across groups
        Cut(lambda y: (*y.chunk(2, dim=1), y)),  # the whole is read, too
        Cut(lambda y: y.chunk(2, dim=2)),  # cut along the rows
    ],
)
def test_others_stay(model: Cut) -> None:
    graph = trace(model.eval(), 8)
    code = graph.code
    assert split_convolution(graph) == 0
    assert graph.code == code
