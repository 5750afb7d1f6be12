"""A Hardsigmoid behind a layer becomes a clamp; any other stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hadaptive_q.rewrite.fold_hardsigmoid import fold_hardsigmoid
from hadaptive_q.rewrite.graph import aten, calls, clamp_bounds, trace


class Gated(nn.Module):
    def __init__(self, bias: bool, inplace: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1, bias=bias)
        self.gate = nn.Hardsigmoid(inplace)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.conv(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inplace", [True, False])
def test_same_values(bias: bool, inplace: bool, assert_float_equal: Callable[[Tensor, Tensor], None]) -> None:
    torch.manual_seed(0)
    model = Gated(bias, inplace).eval()
    graph, x = trace(model, 8), torch.randn(4, 3, 8, 8) * 8
    assert fold_hardsigmoid(graph) == 1
    with torch.no_grad():
        wanted = model(x)
        assert {0.0, 1.0} <= set(wanted.unique().tolist())  # both ends are at work
        assert_float_equal(graph(x), wanted)
    (clamp,) = calls(graph, aten.hardtanh.default)
    assert clamp_bounds(clamp) == (0.0, 1.0)


def test_a_layer_with_another_reader_keeps_its_values() -> None:
    class Twice(Gated):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.gate(y) * y

    graph = trace(Twice(True, False).eval(), 8)
    assert fold_hardsigmoid(graph) == 0
    assert len(list(calls(graph, aten.hardsigmoid.default))) == 1
