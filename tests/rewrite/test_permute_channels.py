from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, cat, nn

from hadaptive_q.rewrite.graph import aten, calls, finish, trace
from hadaptive_q.rewrite.permute_channels import permute_readers, replace_constant

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ORDER = torch.tensor([4, 0, 3, 1, 2])


class Reads(nn.Module):
    """Everything that can be followed reads the five channels of one convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.other = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 2, 1)
        self.depthwise, self.dense = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 4, 1)
        self.scale, self.one = nn.Parameter(torch.randn(1, 5, 1, 1)), nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        bent = nn.functional.hardswish(y * self.scale + self.one).clamp(-1, 1)
        return self.dense(self.depthwise(cat((bent, self.other(x), y.abs().neg() - y / 2), dim=1)))


def permuted(model: nn.Module) -> torch.fx.GraphModule:
    """Let the first convolution deliver its channels in ORDER, and its readers expect that."""
    graph = trace(model, 8)
    conv = next(calls(graph, aten.conv2d.default))
    permute_readers(graph, conv, ORDER)
    weight, bias = (dict(graph.named_parameters())[str(a.target)] for a in conv.args[1:3])  # type: ignore[union-attr]
    replace_constant(graph, conv.args[1], weight[ORDER])  # type: ignore[arg-type]
    replace_constant(graph, conv.args[2], bias[ORDER])  # type: ignore[arg-type]
    finish(graph)
    return graph


def test_readers_follow_the_new_order(assert_float_equal: Callable[[Tensor, Tensor], None]) -> None:
    model = Reads()
    graph = permuted(model)
    assert_float_equal(graph(IMAGES), model(IMAGES))
    weight = next(iter(p for n, p in graph.named_parameters() if n.startswith("conv") and p.dim() == 4))
    assert torch.equal(weight, model.conv.weight[ORDER]), "the test would pass if nothing had moved"
    assert isinstance(weight, nn.Parameter), "it still trains"


class Readers(nn.Module):
    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.depthwise, self.last = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 5, 1, groups=5), last

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.depthwise(y).sum() + self.last(y).sum()


class MeetsAnother(nn.Module):
    """An addition of a tensor whose order stays."""

    def forward(self, y: Tensor) -> Tensor:
        return y + y.flip(1)


@pytest.mark.parametrize(
    "last",
    [nn.Softmax(dim=1), nn.Flatten(), nn.Conv2d(5, 10, 1, groups=5), MeetsAnother()],
    ids=lambda m: type(m).__name__,
)
def test_readers_that_cannot_follow_are_refused_and_nothing_changes(last: nn.Module) -> None:
    model = Readers(last)
    graph = trace(model, 8)
    wanted = graph(IMAGES)
    with pytest.raises(ValueError, match=r"order that cannot be changed|groups of more than one channel"):
        permute_readers(graph, next(calls(graph, aten.conv2d.default)), ORDER)
    graph.recompile()
    assert torch.equal(graph(IMAGES), wanted)
