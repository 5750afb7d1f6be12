"""Selection by counting ranks: exact, ties to the lower channel, no gradient to the scores."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from hadaptive_q.models.ach import ACH, gather_channels
from hadaptive_q.models.config import SlotOrder
from hadaptive_q.rewrite.graph import aten, calls, trace
from hadaptive_q.rewrite.select_by_rank import select_by_rank

GONE = (aten.topk.default, aten.gather.default)
IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def rewritten(model: nn.Module) -> tuple[GraphModule, int]:
    graph = trace(model, 8)
    return graph, select_by_rank(graph)


class Choose(nn.Module):
    """The channels with the largest scores, where a score is a channel's mean rounded to halves: full of ties."""

    def __init__(self, channels: int, cs: int, slot_order: SlotOrder) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.ach = nn.Conv2d(3, channels, 1), ACH(channels, cs, slot_order=slot_order)

    def scores(self, x: Tensor) -> Tensor:
        return (x.mean((-1, -2)) * 2).round()

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mix(x)
        return gather_channels(mixed, self.ach.select(self.scores(mixed)))


@pytest.mark.parametrize("slot_order", ["rank", "channel"])
def test_the_nano_network(slot_order: str, make_graph: Callable[..., GraphModule], inputs: Tensor) -> None:
    graph = make_graph(trace, slot_order)
    with torch.no_grad():
        wanted = graph(inputs)
        assert select_by_rank(graph) == 3
        assert not list(calls(graph, *GONE))
        # A product with a one-hot matrix copies values and scores are untouched: equal to the last bit.
        assert torch.equal(graph(inputs), wanted)
    assert select_by_rank(graph) == 0


def test_blocks_of_one_width_share_what_no_image_changes(assert_float_equal: Callable[[Tensor, Tensor], None]) -> None:
    class Untied(Choose):
        def scores(self, x: Tensor) -> Tensor:
            return x.mean((-1, -2))

    model = nn.Sequential(*(Untied(channels, 3, "rank") for channels in (8, 8, 6))).eval()
    graph, count = rewritten(model)
    assert count == 3
    with torch.no_grad():
        # Not to the last bit: channels that come out last are convolved in another order.
        assert_float_equal(graph(IMAGES), model(IMAGES))
    differences = list(calls(graph, aten.sub.Tensor))
    of_constants = [n for n in differences if all(a.op == "get_attr" for a in n.all_input_nodes)]
    assert len(of_constants) == 2, "[c' < c], for 8 channels and for 6"
    assert sorted(tuple(b.shape) for b in graph.buffers() if b.dim() == 3) == sorted(
        [(1, 8, 1), (1, 1, 8), (1, 6, 1), (1, 1, 6), (1, 1, 3), (1, 1, 1)]
    )


@pytest.mark.parametrize("slot_order", ["rank", "channel"])
@pytest.mark.parametrize(("channels", "cs"), [(4, 2), (5, 3), (16, 6), (16, 16)])
def test_ties_go_to_the_lower_channel(channels: int, cs: int, slot_order: SlotOrder) -> None:
    model = Choose(channels, cs, slot_order).eval()
    graph, count = rewritten(model)
    assert count == 1
    with torch.no_grad():
        got, mixed = graph(IMAGES), model.mix(IMAGES)
        chosen = model.scores(mixed).sort(dim=1, descending=True, stable=True).indices[:, :cs]
        if slot_order == "channel":
            chosen = chosen.sort(dim=1).values
        assert torch.equal(got, gather_channels(mixed, chosen))
    scores = model.scores(mixed)
    assert any(len(set(row)) < channels for row in scores.tolist()), "no ties to decide"


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6, 1e19])
def test_scores_of_any_size_are_told_apart(size: float) -> None:
    class Scaled(Choose):
        def scores(self, x: Tensor) -> Tensor:
            return x.mean((-1, -2)) * size

    model = Scaled(16, 6, "rank").eval()
    graph, _ = rewritten(model)
    with torch.no_grad():
        assert torch.equal(graph(IMAGES), model(IMAGES))


def test_neighbouring_floats_are_told_apart() -> None:
    class Next(Choose):
        def scores(self, x: Tensor) -> Tensor:
            return 0.3 + torch.arange(16.0) * 2**-24 + 0 * x.mean((-1, -2))  # half a unit in the last place apart

    model = Next(16, 3, "rank").eval()
    graph, _ = rewritten(model)
    with torch.no_grad():
        mixed = model.mix(IMAGES)
        order = model.scores(mixed).sort(dim=1, descending=True, stable=True).indices[:, :3]
        assert torch.equal(graph(IMAGES), gather_channels(mixed, order))


def test_chosen_channels_pass_their_gradient_and_scores_take_none() -> None:
    model = Choose(8, 3, "rank").eval()
    model.scores = lambda x: x.mean((-1, -2))  # type: ignore[method-assign]
    graph, _ = rewritten(model)
    x = IMAGES[:2].clone().requires_grad_()
    weights = torch.randn(2, 3, 8, 8)
    (graph(x) * weights).sum().backward()
    got, x.grad = x.grad, None
    (model(x) * weights).sum().backward()
    assert got is not None
    assert x.grad is not None
    torch.testing.assert_close(got, x.grad, rtol=1e-5, atol=1e-6)


def test_a_gather_of_something_else_stays() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return gather_channels(x, torch.tensor([[2, 0]]).expand(x.shape[0], -1))

    graph, count = rewritten(Fixed())
    assert count == 0
    assert torch.equal(graph(IMAGES), IMAGES[:, [2, 0]])
