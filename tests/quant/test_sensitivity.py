"""Sensitivities against whole runs of a graph that was planned with one layer in 4 bits."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from hadaptive_q.quant import sensitivity
from hadaptive_q.quant.backends import torchao_pt2e as backend
from hadaptive_q.quant.backends.torchao_pt2e import Calibrated, weight_quantizer
from hadaptive_q.quant.plan import make_plan
from hadaptive_q.quant.sensitivity import FourBitLayer, find_layers, in_four_bits, joint_noise, measure_sensitivity
from hadaptive_q.recipe import QuantizeConfig
from hadaptive_q.rewrite.deploy import deploy_graph
from hadaptive_q.rewrite.graph import constant


@pytest.fixture(scope="module")
def deploy(make_graph: Callable[..., GraphModule]) -> GraphModule:
    return make_graph(deploy_graph, "static")


@pytest.fixture(scope="module")
def calibrated(deploy: GraphModule, inputs: Tensor) -> Calibrated:
    graph = copy.deepcopy(deploy)
    return backend.calibrate(backend.prepare(graph, make_plan(graph, QuantizeConfig()), "minmax"), [inputs])


@pytest.fixture(scope="module")
def layers(deploy: GraphModule, calibrated: Calibrated, inputs: Tensor) -> list[FourBitLayer]:
    return measure_sensitivity(calibrated.graph, find_layers(deploy), inputs)


def share(reference: Tensor, noisy: Tensor) -> float:
    return float((reference - noisy).double().square().sum() / reference.double().square().sum())


def test_every_layer_that_can_is_measured(deploy: GraphModule, layers: list[FourBitLayer]) -> None:
    assert [layer.layer for layer in layers] == [layer.layer for layer in find_layers(deploy)]
    by_name = {layer.layer: layer for layer in layers}
    assert {"stem.1.conv", "blocks.2.expansion.pointwise", "tail.conv", "head.hidden"} <= by_name.keys()
    assert by_name["head.hidden"].weights == 40 * 48
    assert by_name["head.hidden"].bytes_saved == 40 * 48 // 2
    # 4 bits have steps 127 / 7 as wide as 8 bits have: no layer of the network gets away without noise.
    assert all(0 < layer.sensitivity < 1 for layer in layers)


def test_one_layer_by_hand(calibrated: Calibrated, layers: list[FourBitLayer], inputs: Tensor) -> None:
    """No switch involved: the weight is rounded to 15 codes per row, which 8 bits then keep."""
    layer = next(layer for layer in layers if layer.layer == "tail.conv")
    graph = copy.deepcopy(calibrated.graph)
    (node,) = (node for node in graph.graph.nodes if node.name in layer.nodes)
    with torch.no_grad():
        plain = graph(inputs)
        weight = constant(graph, node.args[1].args[0])
        assert weight is not None
        scale = weight.abs().amax(dim=(1, 2, 3), keepdim=True) / 7
        weight.copy_((weight / scale).round() * scale)
        weight_quantizer(graph, node).disable_fake_quant()
        by_hand = share(plain, graph(inputs))
    assert layer.sensitivity == pytest.approx(by_hand, rel=1e-3)


def test_joint_noise(calibrated: Calibrated, layers: list[FourBitLayer], inputs: Tensor) -> None:
    graph = calibrated.graph
    assert joint_noise(graph, [], inputs) == 0
    assert joint_noise(graph, layers[4:5], inputs) == pytest.approx(layers[4].sensitivity, rel=1e-6)
    with torch.no_grad():
        plain = graph(inputs)
        with in_four_bits(graph, layers):
            noisy = graph(inputs)
        again = graph(inputs)
    assert joint_noise(graph, layers, inputs) == pytest.approx(share(plain, noisy), rel=1e-3)
    assert torch.equal(plain, again), "the bits are put back"


def test_a_layer_whose_bias_has_no_room_is_left_out(
    deploy: GraphModule, calibrated: Calibrated, inputs: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "LARGEST_SHIFTED_BIAS", 0)
    biased = [n.name for n in deploy.graph.nodes if len(n.args) > 2 and n.args[2] is not None]
    left = measure_sensitivity(calibrated.graph, find_layers(deploy), inputs[:2])
    assert len(left) < len(find_layers(deploy))
    assert not {name for layer in left for name in layer.nodes} & set(biased)
