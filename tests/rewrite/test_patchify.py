from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hadaptive_q.models.hadaptive_net import HadaptiveNet
from hadaptive_q.rewrite.fold_batch_norm import fold_batch_norm
from hadaptive_q.rewrite.graph import aten, calls, trace
from hadaptive_q.rewrite.merge_convolutions import merge_convolutions
from hadaptive_q.rewrite.patchify import patchify

Check = Callable[[Tensor, Tensor], None]
IMAGES = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", [2, 3, 4, (2, 4), (1, 3), 24])
def test_patches_become_channels(kernel: int | tuple[int, int], bias: bool, assert_float_equal: Check) -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(3, 5, kernel, kernel, bias=bias)
    graph = trace(model, 24)
    assert patchify(graph) == 1
    (conv,) = calls(graph, aten.conv2d.default)
    weight = dict(graph.named_parameters())[str(conv.args[1].target)]  # type: ignore[union-attr]
    assert weight.shape == (5, 3 * model.kernel_size[0] * model.kernel_size[1], 1, 1)
    with torch.no_grad():
        for batch in (1, 2):
            assert_float_equal(graph(IMAGES[:batch]), model(IMAGES[:batch]))
    assert patchify(graph) == 0


def test_the_stem_of_the_nano_network(
    nano: HadaptiveNet, nano_traced: torch.fx.GraphModule, inputs: Tensor, assert_float_equal: Check
) -> None:
    fold_batch_norm(nano_traced)
    merge_convolutions(nano_traced)
    assert patchify(nano_traced) == 1
    with torch.no_grad():
        assert_float_equal(nano_traced(inputs), nano(inputs))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 5, 3, 2),
        nn.Conv2d(3, 5, 2, 2, padding=1),
        nn.Conv2d(3, 5, 2, 2, dilation=2),
        nn.Conv2d(3, 6, 2, 2, groups=3),
        nn.Conv2d(3, 5, 1),
        nn.Conv2d(3, 5, 5, 5),
    ],
    ids=["overlapping", "padded", "dilated", "grouped", "1x1", "a remainder"],
)
def test_other_convolutions_stay(conv: nn.Conv2d) -> None:
    graph = trace(conv, 24)
    assert patchify(graph) == 0
    assert torch.equal(graph(IMAGES), conv(IMAGES))


def test_many_channels_fill_a_vector_already() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 2, 2))
    graph = trace(model, 24)
    assert patchify(graph) == 0
