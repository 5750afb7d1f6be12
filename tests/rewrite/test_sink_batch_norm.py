"""A BatchNorm without a convolution before it goes into the layers behind it, where all of them can take it in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hadaptive_q.rewrite.graph import aten, calls, trace
from hadaptive_q.rewrite.sink_batch_norm import sink_batch_norm


class Net(nn.Module):
    """`first` twice, added; a BatchNorm; what `readers` make of it, added."""

    def __init__(self, *readers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.bn, self.readers = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ModuleList(readers)
        for tensor in (self.bn.weight, self.bn.running_var):
            nn.init.uniform_(tensor, 0.5, 2)  # type: ignore[arg-type]
        for tensor in (self.bn.bias, self.bn.running_mean):
            nn.init.uniform_(tensor, -1, 1)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        normed = self.bn(y + y.relu())
        return sum(reader(normed) for reader in self.readers)  # type: ignore[return-value]


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.layer = nn.Dropout(), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.dropout(x.mean((-1, -2), keepdim=True).flatten(1)))


@pytest.mark.parametrize(
    "readers",
    [
        pytest.param([Pooled], id="linear behind a mean"),
        pytest.param([lambda: nn.Conv2d(6, 5, 1, bias=False)], id="1x1 without bias"),
        pytest.param([lambda: nn.Conv2d(6, 4, 3), lambda: nn.Conv2d(6, 4, 3)], id="two, of 3x3 without padding"),
        pytest.param([lambda: nn.Conv2d(6, 6, 2, 2, groups=6)], id="depthwise"),
    ],
)
def test_same_values(
    readers: list[Callable[[], nn.Module]], assert_float_equal: Callable[[Tensor, Tensor], None]
) -> None:
    model = Net(*(make() for make in readers)).eval()
    graph, x = trace(model, 8), torch.randn(4, 3, 8, 8)
    assert sink_batch_norm(graph) == 1
    assert not list(calls(graph, aten.batch_norm.default))
    with torch.no_grad():
        assert_float_equal(graph(x), model(x))


@pytest.mark.parametrize(
    "readers",
    [
        pytest.param([lambda: nn.Conv2d(6, 4, 3, padding=1)], id="it pads"),
        pytest.param([lambda: nn.Conv2d(6, 6, 1, groups=2)], id="in groups"),
        pytest.param([nn.ReLU], id="no layer"),
        pytest.param([lambda: nn.Conv2d(6, 6, 1), nn.ReLU], id="a layer and something else"),
    ],
)
def test_others_keep_it(readers: list[Callable[[], nn.Module]]) -> None:
    graph = trace(Net(*(make() for make in readers)).eval(), 8)
    assert sink_batch_norm(graph) == 0
    assert len(list(calls(graph, aten.batch_norm.default))) == 1
