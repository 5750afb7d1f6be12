"""Linears of one input that are added become one, constant factors go into the weights; nothing else changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hadaptive_q.rewrite.graph import aten, calls, trace
from hadaptive_q.rewrite.merge_linears import merge_linears

Form = Callable[[Tensor, Tensor, Tensor], Tensor]


class Heads(nn.Module):
    def __init__(self, form: Form, bias: tuple[bool, bool] = (True, True)) -> None:
        super().__init__()
        self.one, self.other = (nn.Linear(12, 5, bias=each) for each in bias)
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :2, :2].flatten(1)
        return self.form(x, self.one(x), self.other(x))


@pytest.mark.parametrize("bias", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize(
    ("form", "merged"),
    [
        (lambda x, a, b: (a + b) / 2, 2),
        (lambda x, a, b: (a + b) * 0.5, 2),
        (lambda x, a, b: 0.3 * a + b, 2),
    ],
)
def test_two_heads_become_one(
    form: Form, merged: int, bias: tuple[bool, bool], assert_float_equal: Callable[[Tensor, Tensor], None]
) -> None:
    torch.manual_seed(0)
    model, x = Heads(form, bias).eval(), torch.randn(3, 3, 4, 4)
    graph = trace(model, 4)
    assert merge_linears(graph) == merged
    (layer,) = calls(graph, aten.linear.default)
    assert not list(calls(graph, aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor))
    assert layer.meta["val"].shape[1:] == (5,)
    with torch.no_grad():
        assert_float_equal(graph(x), model(x))
    assert merge_linears(graph) == 0


@pytest.mark.parametrize(
    "form",
    [
        lambda x, a, b: (a + b) * a,  # the first is read twice
        lambda x, a, b: a + b.relu(),
        lambda x, a, b: torch.add(a, b, alpha=2),
        lambda x, a, b: a * b,
        lambda x, a, b: (a + x[:, :5]) * b,
        lambda x, a, b: a / b,
    ],
)
def test_others_stay(form: Form) -> None:
    graph = trace(Heads(form).eval(), 4)
    code = graph.code
    assert merge_linears(graph) == 0
    assert graph.code == code


def test_linears_of_two_inputs_stay() -> None:
    class Two(Heads):
        def forward(self, x: Tensor) -> Tensor:
            return self.one(x[:, :, :2, :2].flatten(1)) + self.other(x[:, :, 2:, 2:].flatten(1))

    assert merge_linears(trace(Two(lambda x, a, b: a).eval(), 4)) == 0
