from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hadaptive_q.models.ach import ACH
from hadaptive_q.models.blocks import Bottleneck
from hadaptive_q.models.config import ACHConfig, Norm
from hadaptive_q.models.cross_hadamard import pair_indices
from hadaptive_q.rewrite.fold_batch_norm import fold_batch_norm
from hadaptive_q.rewrite.graph import aten, calls, trace
from hadaptive_q.rewrite.roll_pairs import roll_pairs, rolled_pairs, slot_order
from hadaptive_q.rewrite.sink_concat import sink_concat

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("cs", range(2, 37))
def test_rolled_pairs_are_all_pairs_once(cs: int) -> None:
    pairs = rolled_pairs(cs)
    assert {frozenset(pair) for pair in pairs} == {frozenset((i, j)) for i in range(cs) for j in range(i)}
    assert len(pairs) == cs * (cs - 1) // 2
    i, j = pair_indices(cs)
    for place, slot in enumerate(slot_order(cs).tolist()):
        assert {int(i[slot]), int(j[slot])} == set(pairs[place])


class Net(nn.Module):
    """An ACH bottleneck, as if trained."""

    def __init__(self, cs: int, norm: Norm) -> None:
        super().__init__()
        torch.manual_seed(cs)
        self.first = nn.Conv2d(3, 8, 1)
        self.block = Bottleneck(8, ACHConfig(channels=8, cs=cs, k=3, norm=norm), "rank")
        for name, tensor in self.block.state_dict().items():
            if tensor.is_floating_point() and "scorer" not in name:
                tensor.uniform_(0.2, 1.5) if "running_var" in name else tensor.normal_()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.first(x))


@pytest.mark.parametrize("norm", ["dysoft", "batch_norm"])
@pytest.mark.parametrize("cs", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("sunk", [True, False])
def test_products_by_slices(
    sunk: bool, cs: int, norm: Norm, assert_float_equal: Callable[[Tensor, Tensor], None]
) -> None:
    model = Net(cs, norm).eval()
    graph = trace(model, 8)
    fold_batch_norm(graph)
    if sunk:
        sink_concat(graph)
    assert roll_pairs(graph) == 1
    assert not list(calls(graph, aten.index.Tensor))
    with torch.no_grad():
        assert_float_equal(graph(IMAGES), model(IMAGES))
    assert roll_pairs(graph) == 0


def test_slots_that_someone_reads_in_their_order_are_refused() -> None:
    """Here the products are the output: they cannot come in another order."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), ACH(8, 4)).eval()
    graph = trace(model, 8)
    with torch.no_grad():
        wanted = graph(IMAGES)
        with pytest.raises(ValueError, match="reads channels in an order that cannot be changed"):
            roll_pairs(graph)
        graph.recompile()
        assert torch.equal(graph(IMAGES), wanted), "nothing was changed"


def test_other_pairs_stay() -> None:
    class Others(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("i", torch.tensor([0, 1, 0]))
            self.register_buffer("j", torch.tensor([1, 2, 2]))  # all pairs of three, but not row-major

        def forward(self, x: Tensor) -> Tensor:
            return x[:, self.i] * x[:, self.j]

    graph = trace(Others(), 8)
    assert roll_pairs(graph) == 0
    assert torch.equal(graph(IMAGES), Others()(IMAGES))
