from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from hadaptive_q.quant.backends import torchao_pt2e as backend
from hadaptive_q.quant.live_batch_norm import refold_batch_norm, unfold_batch_norm
from hadaptive_q.quant.plan import make_plan
from hadaptive_q.recipe import QuantizeConfig

Close = Callable[[Tensor, Tensor], None]


def norms(graph: GraphModule) -> list[nn.BatchNorm2d]:
    return [module for module in graph.modules() if isinstance(module, nn.BatchNorm2d)]


def test_it_begins_as_the_identity_and_folds_to_nothing(
    nano_graph: GraphModule, inputs: Tensor, assert_float_equal: Close
) -> None:
    before = nano_graph(inputs)
    count = unfold_batch_norm(nano_graph, [inputs[:16], inputs[16:]])
    assert count == len(norms(nano_graph)) > 20
    for norm in norms(nano_graph):
        norm.eval()
    assert_float_equal(nano_graph(inputs), before)
    assert refold_batch_norm(nano_graph) == count
    assert norms(nano_graph) == []
    assert_float_equal(nano_graph(inputs), before)


def test_what_was_trained_is_what_is_folded(nano_graph: GraphModule, inputs: Tensor, assert_float_equal: Close) -> None:
    unfold_batch_norm(nano_graph, [inputs])
    torch.manual_seed(0)
    for norm in norms(nano_graph):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    nano_graph(inputs)  # in train mode: the running statistics move
    for norm in norms(nano_graph):
        norm.eval()
    trained = nano_graph(inputs)
    refold_batch_norm(nano_graph)
    assert_float_equal(nano_graph(inputs), trained)


def test_training_normalises_by_the_batch(nano_graph: GraphModule, inputs: Tensor) -> None:
    unfold_batch_norm(nano_graph, [inputs])
    live = nano_graph(inputs[:4])
    for norm in norms(nano_graph):
        norm.eval()
    assert not torch.allclose(live, nano_graph(inputs[:4]), rtol=1e-2)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("batch_norm", ["folded", "live"])
def test_weights_keep_their_codes(
    nano_graph: GraphModule, inputs: Tensor, batch_norm: str, bits: Literal[4, 8]
) -> None:
    plan = make_plan(nano_graph, QuantizeConfig(pointwise_weight_bits=bits))
    calibrated = backend.calibrate(backend.prepare(nano_graph, plan, "minmax"), [inputs])
    before = copy.deepcopy(calibrated.graph)(inputs)
    backend.start_fit(calibrated, learned=True, live=[inputs] if batch_norm == "live" else None)
    assert bool(norms(calibrated.graph)) == (batch_norm == "live")
    backend.end_fit(calibrated)
    assert norms(calibrated.graph) == []
    # Untrained: scales of weights and biases move by rounding only, which a few codes may show.
    after = calibrated.graph(inputs)
    assert float((after - before).square().sum() / before.square().sum()) < 1e-3
