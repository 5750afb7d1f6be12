from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from hadaptive_q.models.hadaptive_net import HadaptiveNet
from hadaptive_q.rewrite.fold_batch_norm import fold_batch_norm
from hadaptive_q.rewrite.graph import aten, calls, trace

Check = Callable[[Tensor, Tensor], None]
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def batch_norm(channels: int, kind: type = nn.BatchNorm2d, **options: object) -> nn.Module:
    """A norm in eval mode whose statistics and parameters are away from 0 and 1."""
    norm = kind(channels, **options)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.2, 3)
    if norm.affine:
        nn.init.normal_(norm.weight)  # negative ones too
        nn.init.normal_(norm.bias)
    return norm.eval()


def folded(model: nn.Module) -> tuple[GraphModule, int]:
    graph = trace(model, 8)
    return graph, fold_batch_norm(graph)


def test_the_nano_network(
    nano: HadaptiveNet, nano_traced: GraphModule, inputs: Tensor, assert_float_equal: Check
) -> None:
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in nano.modules())
    assert fold_batch_norm(nano_traced) == norms
    assert not list(calls(nano_traced, aten.batch_norm.default))
    assert not [name for name, _ in nano_traced.named_buffers() if "running" in name or "num_batches" in name]
    with torch.no_grad():
        assert_float_equal(nano_traced(inputs), nano(inputs))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"eps": 0.1}], ids=str)
def test_a_convolution_takes_its_norm_up(bias: bool, options: dict[str, object], assert_float_equal: Check) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3, bias=bias), batch_norm(5, **options))
    graph, count = folded(model)
    assert count == 1
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"] == [aten.conv2d.default]
    assert_float_equal(graph(IMAGES), model(IMAGES))


@pytest.mark.parametrize(
    "conv",
    [nn.Conv2d(3, 6, 3, 2, 1, groups=3), nn.Conv2d(3, 3, 3, padding=1, groups=3), nn.Conv2d(3, 4, 2, dilation=2)],
)
def test_groups_strides_padding_and_dilation_are_kept(conv: nn.Conv2d, assert_float_equal: Check) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv, batch_norm(conv.out_channels))
    graph, count = folded(model)
    assert count == 1
    assert_float_equal(graph(IMAGES), model(IMAGES))


def test_a_norm_without_a_convolution_becomes_scale_and_shift(assert_float_equal: Check) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.ReLU(), batch_norm(3))
    graph, count = folded(model)
    assert count == 1
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"] == [
        *(aten.relu.default, aten.mul.Tensor, aten.add.Tensor)
    ]
    assert_float_equal(graph(IMAGES), model(IMAGES))


def test_a_norm_of_flat_features_keeps_their_shape(assert_float_equal: Check) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 7), batch_norm(7, nn.BatchNorm1d))
    graph, count = folded(model)
    assert count == 1
    assert_float_equal(graph(IMAGES), model(IMAGES))


class SharedOutput(nn.Module):
    """A convolution that others read before its norm: folding would change what they see."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), batch_norm(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + y


class SharedWeights(nn.Module):
    """One convolution in two places under different norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(3, 3, 1), batch_norm(3), batch_norm(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(self.conv(x)) + self.two(self.conv(-x))


@pytest.mark.parametrize("kind", [SharedOutput, SharedWeights])
def test_what_others_read_stays_as_it_was(kind: type[nn.Module], assert_float_equal: Check) -> None:
    torch.manual_seed(0)
    model = kind()
    graph, count = folded(model)
    assert count == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert not list(calls(graph, aten.batch_norm.default))
    assert_float_equal(graph(IMAGES), model(IMAGES))


def test_the_folded_graph_trains_and_the_model_is_left_alone(nano: HadaptiveNet, nano_traced: GraphModule) -> None:
    before = {n: t.clone() for n, t in nano.state_dict().items()}
    fold_batch_norm(nano_traced)
    nano_traced(torch.randn(2, 3, 32, 32)).square().sum().backward()
    # The scores choose and carry no gradient in the traced eval form; everything else trains.
    idle = [name for name, p in nano_traced.named_parameters() if p.grad is None]
    assert all("scorer" in name for name in idle)
    assert len(idle) < 4
    assert all(torch.equal(t, before[n]) or t.isnan().all() for n, t in nano.state_dict().items())


def test_a_second_time_there_is_nothing_to_fold(nano_traced: GraphModule) -> None:
    fold_batch_norm(nano_traced)
    code = nano_traced.code
    assert fold_batch_norm(nano_traced) == 0
    assert nano_traced.code == code
