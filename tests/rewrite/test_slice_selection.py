from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from hadaptive_q.models.hadaptive_net import HadaptiveNet
from hadaptive_q.rewrite.fold_batch_norm import fold_batch_norm
from hadaptive_q.rewrite.graph import aten, calls, trace
from hadaptive_q.rewrite.sink_concat import sink_concat
from hadaptive_q.rewrite.slice_selection import slice_selection

Check = Callable[[Tensor, Tensor], None]
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sunk", [True, False])
def test_the_frozen_nano_network(
    sunk: bool,
    make_nano: Callable[..., HadaptiveNet],
    make_graph: Callable[..., GraphModule],
    inputs: Tensor,
    assert_float_equal: Check,
) -> None:
    model, graph = make_nano("static"), make_graph(trace, "static")
    fold_batch_norm(graph)
    if sunk:
        sink_concat(graph)
    assert slice_selection(graph) == 3
    assert len(list(calls(graph, aten.slice.Tensor))) == 3
    assert len(list(calls(graph, aten.index.Tensor))) == 6, "the pairs are not selections"
    with torch.no_grad():
        assert_float_equal(graph(inputs), model(inputs))
    assert slice_selection(graph) == 0


def test_a_selection_per_sample_stays(nano_traced: GraphModule, inputs: Tensor) -> None:
    fold_batch_norm(nano_traced)
    with torch.no_grad():
        wanted = nano_traced(inputs)
        assert slice_selection(nano_traced) == 0
        assert torch.equal(nano_traced(inputs), wanted)


class Chosen(nn.Module):
    """A convolution of which some channels are chosen, and others read all of them."""

    def __init__(self, channels: list[int], bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.after = nn.Conv2d(3, 6, 1, bias=bias), nn.Conv2d(6, 2, 3)
        self.depthwise, self.last = nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 2, 1)
        self.shift = nn.Parameter(torch.randn(1, 6, 1, 1))
        self.register_buffer("chosen", torch.tensor(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        rest = self.after(nn.functional.hardswish(y) + self.shift) + self.last(self.depthwise(y * 2).abs())
        weights = torch.arange(1.0, len(self.chosen) + 1)[None, :, None, None]
        return rest.mean() + (y[:, self.chosen] * weights)[:, :, :6, :6]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("channels", [[5, 0, 3], [0, 1], [5, 4, 3, 2, 1, 0]])
def test_chosen_channels_come_first_in_their_slots_order(
    channels: list[int], bias: bool, assert_float_equal: Check
) -> None:
    model = Chosen(channels, bias)
    graph = trace(model, 8)
    assert slice_selection(graph) == 1
    assert not list(calls(graph, aten.index.Tensor))
    assert_float_equal(graph(IMAGES), model(IMAGES))


def test_the_model_keeps_its_order() -> None:
    model = Chosen([5, 0, 3])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    slice_selection(trace(model, 8))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_channels_that_no_convolution_makes_stay_indexed() -> None:
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("chosen", torch.tensor([2, 0]))

        def forward(self, x: Tensor) -> Tensor:
            return x[:, self.chosen] * 2

    graph = trace(Direct(), 8)
    assert slice_selection(graph) == 0
    assert torch.equal(graph(IMAGES), IMAGES[:, [2, 0]] * 2)
