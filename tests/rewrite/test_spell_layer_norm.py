"""A LayerNorm over channels becomes operators of maps, and its scale and shift go into the layers behind it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hadaptive_q.models.s2aformer import ChannelNorm
from hadaptive_q.rewrite.deploy import deploy_graph
from hadaptive_q.rewrite.graph import aten, calls, trace
from hadaptive_q.rewrite.spell_layer_norm import spell_layer_norm


class Net(nn.Module):
    """A layer, `norm` and what `readers` make of its result, added."""

    def __init__(self, norm: nn.Module, *readers: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.readers = nn.Conv2d(3, 6, 1), norm, nn.ModuleList(readers)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(self.first(x))
        return sum(reader(normed) for reader in self.readers)  # type: ignore[return-value]


def make(*readers: nn.Module, affine: bool = True, bias: bool = True) -> Net:
    torch.manual_seed(0)
    norm = ChannelNorm(6, 1e-3, elementwise_affine=affine, bias=bias)
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 2)
    return Net(norm, *readers).eval()


@pytest.mark.parametrize(("affine", "bias"), [(True, True), (True, False), (False, False)])
def test_same_values(affine: bool, bias: bool, assert_float_equal: Callable[[Tensor, Tensor], None]) -> None:
    model = make(nn.ReLU(), affine=affine, bias=bias)
    # A pixel of one value, too, where epsilon is all of the root.
    graph, x = trace(model, 8), torch.cat((torch.randn(3, 3, 8, 8) * 5 + 3, torch.zeros(1, 3, 8, 8)))
    assert spell_layer_norm(graph) == 1
    assert not list(calls(graph, aten.layer_norm.default, aten.permute.default))
    assert len(list(calls(graph, aten.batch_norm.default))) == affine
    with torch.no_grad():
        assert_float_equal(graph(x), model(x))


@pytest.mark.parametrize(
    ("readers", "bias", "products"),
    [
        pytest.param([lambda: nn.Conv2d(6, 4, 1), lambda: nn.Conv2d(6, 4, 1)], True, 2, id="two of 1x1"),
        pytest.param([lambda: nn.Conv2d(6, 6, 2, 2, groups=6)], True, 2, id="depthwise without padding"),
        pytest.param([lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6)], False, 2, id="padding, no shift"),
        pytest.param([lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6)], True, 3, id="padding and shift: both stay"),
    ],
)
def test_scale_and_shift_go_where_that_is_exact(
    readers: list[Callable[[], nn.Module]],
    bias: bool,
    products: int,
    assert_float_equal: Callable[[Tensor, Tensor], None],
) -> None:
    model, x = make(*(reader() for reader in readers), bias=bias), torch.randn(4, 3, 8, 8) * 2
    graph = deploy_graph(model, 8)
    # The squares, the normed values, and what is left of the scale.
    assert len(list(calls(graph, aten.mul.Tensor))) == products
    with torch.no_grad():
        assert_float_equal(graph(x), model(x))


class Rows(nn.Module):
    """A LayerNorm over `shape`, between the permutations or not."""

    def __init__(self, permuted: bool, *shape: int) -> None:
        super().__init__()
        self.permuted, self.norm = permuted, nn.LayerNorm(shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if self.permuted else self.norm(x)


@pytest.mark.parametrize("norm", [Rows(True, 8, 6), Rows(False, 8)], ids=["over columns, too", "over columns alone"])
def test_others_stay(norm: Rows) -> None:
    graph = trace(Net(norm, nn.ReLU()).eval(), 8)
    assert spell_layer_norm(graph) == 0
    assert len(list(calls(graph, aten.layer_norm.default))) == 1
