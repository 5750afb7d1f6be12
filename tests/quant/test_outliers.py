from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from hadaptive_q.quant.backends import torchao_pt2e as backend
from hadaptive_q.quant.outliers import LIMIT, drop_outliers
from hadaptive_q.quant.plan import make_plan
from hadaptive_q.recipe import QuantizeConfig


class Square(torch.nn.Module):
    """Stands for a network whose products have no bound; the identity behind the square is what is watched."""

    def __init__(self) -> None:
        super().__init__()
        self.watched = torch.nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.watched(x * x)
        return out


def images(*sizes: float) -> Tensor:
    return torch.tensor(sizes).reshape(-1, 1, 1, 1).expand(-1, 3, 4, 4)


def test_an_image_beyond_the_limit_is_dropped_and_the_rest_stays() -> None:
    net = Square()
    beyond = (LIMIT * 1.1) ** 0.5
    batches = [images(*[1.0] * 9, beyond), images(*[-1.0] * 10)]
    kept = drop_outliers(net, [net.watched], batches)
    assert torch.equal(kept[0], images(*[1.0] * 9))
    assert kept[1] is batches[1]
    assert not net.watched._forward_pre_hooks


def test_within_the_limit_everything_stays_the_very_same() -> None:
    net = Square()
    batches = [images(*[1.0] * 19, (LIMIT * 0.9) ** 0.5)]
    assert drop_outliers(net, [net.watched], batches)[0] is batches[0]


def test_a_batch_of_outliers_goes_and_what_is_zero_for_most_says_nothing() -> None:
    net = Square()
    batches = [images(*[1.0] * 20), images(100.0)]
    assert len(drop_outliers(net, [net.watched], batches)) == 1
    rare = [images(*[0.0] * 20, 5.0)]
    assert drop_outliers(net, [net.watched], rare)[0] is rare[0]


@pytest.mark.parametrize("factor", [1.0, 1e4])
def test_ranges_do_not_cover_an_exploding_image(factor: float, nano_graph: GraphModule, inputs: Tensor) -> None:
    outlier = inputs[:1] * factor
    prepared = backend.prepare(nano_graph, make_plan(nano_graph, QuantizeConfig()), "minmax")
    ready = backend.calibrate(prepared, [inputs, outlier])
    (first, *_) = backend.activation_quantizers(ready.graph)
    assert float(first.high - first.low) <= 1.01 * float(inputs.max() - inputs.min())
