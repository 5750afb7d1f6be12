from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from hadaptive_q.quant.backends import torchao_pt2e as backend
from hadaptive_q.quant.damping import oscillation_damping
from hadaptive_q.quant.plan import make_plan
from hadaptive_q.recipe import QuantizeConfig


@pytest.fixture
def calibrated(nano_graph: GraphModule, inputs: Tensor) -> GraphModule:
    plan = make_plan(nano_graph, QuantizeConfig())
    return backend.calibrate(backend.prepare(nano_graph, plan, "minmax"), [inputs]).graph


def weights(graph: GraphModule) -> list[torch.nn.Parameter]:
    return [p for p in graph.parameters() if p.dim() in (2, 4) and p.numel() > 1 and p.requires_grad]


def test_it_is_the_squared_distance_to_the_codes(calibrated: GraphModule) -> None:
    total = 0.0
    for weight in weights(calibrated):
        if weight.shape[0] == 1:
            continue  # constants of a product, not layers
        scale = weight.detach().abs().amax(tuple(range(1, weight.dim())), keepdim=True) / 127
        total += float((weight - (weight / scale).round() * scale).double().square().sum())
    assert total > 0
    assert float(oscillation_damping(calibrated, 2.0)()) == pytest.approx(2 * total, rel=1e-3)


def test_a_step_moves_weights_towards_their_codes(calibrated: GraphModule) -> None:
    penalty = oscillation_damping(calibrated, 1.0)
    before = penalty()
    before.backward()
    with torch.no_grad():
        for parameter in calibrated.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.25 * parameter.grad)  # the gradient is twice the distance: half of it is left
    assert float(penalty()) == pytest.approx(float(before) / 4, rel=0.05)
