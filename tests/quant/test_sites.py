"""Every rounding of a calibrated graph is found once, with the layer people know it by, and has a switch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from hadaptive_q.models.hadaptive_net import HadaptiveNet
from hadaptive_q.quant.backends import torchao_pt2e as backend
from hadaptive_q.quant.plan import make_plan
from hadaptive_q.quant.sites import Site, find_sites
from hadaptive_q.recipe import QuantizeConfig
from hadaptive_q.rewrite.deploy import deploy_graph


@pytest.fixture(scope="module")
def ready(make_graph: Callable[..., GraphModule], inputs: Tensor) -> backend.Calibrated:
    graph = make_graph(deploy_graph)
    return backend.calibrate(backend.prepare(graph, make_plan(graph, QuantizeConfig()), "mse"), [inputs])


@pytest.fixture(scope="module")
def sites(ready: backend.Calibrated) -> list[Site]:
    return find_sites(ready.graph)


def test_every_planned_tensor_is_at_one_site(ready: backend.Calibrated, sites: list[Site]) -> None:
    activations = [name for site in sites if site.kind == "activation" for name in site.tensors]
    assert sorted(activations) == sorted(ready.plan.activations)
    assert sum(site.kind == "weight" for site in sites) == len(ready.plan.weights)
    assert len({id(site.quantizer) for site in sites}) == len(sites)
    shared = {name for site in sites for name in site.tensors[1:]}
    assert shared == set(ready.plan.shared)


def test_layers_are_modules_of_the_network(sites: list[Site], nano: HadaptiveNet) -> None:
    assert {site.layer for site in sites} - {"input"} <= {name for name, _ in nano.named_modules()}
    order = [site.layer.split(".")[0] for site in sites]
    assert order == sorted(order, key=["input", "stem", "blocks", "tail", "head"].index)


def test_without_any_rounding_the_graph_is_the_float_network(
    ready: backend.Calibrated, sites: list[Site], nano: HadaptiveNet, inputs: Tensor, assert_float_equal: Callable
) -> None:
    with torch.no_grad():
        rounded = ready.graph(inputs)
        for site in sites:
            site.switch(False)
        plain = ready.graph(inputs)
        for site in sites:
            site.switch(True)
        # Biases stay on the integer grid: half a step of the finest accumulator is far below a code.
        wanted = nano(inputs)
        assert float((plain - wanted).abs().max()) < 0.02 * float(wanted.abs().max())
        assert torch.equal(ready.graph(inputs), rounded)
        assert not torch.equal(plain, rounded)


def test_clipped_is_what_rounding_cannot_reach(ready: backend.Calibrated, sites: list[Site], inputs: Tensor) -> None:
    site = next(site for site in sites if site.kind == "activation")
    scale, zero_point = (float(value) for value in site.quantizer.calculate_qparams())
    low, high = (-128 - zero_point) * scale, (127 - zero_point) * scale
    x = torch.tensor([low - 0.6 * scale, low - 0.4 * scale, low, 0.0, high, high + 0.4 * scale, high + 0.6 * scale])
    assert site.clipped(x).tolist() == [True, False, False, False, False, False, True]
    weights = [site for site in sites if site.kind == "weight"]
    for site in weights:  # a scale reaches its channel's largest weight
        assert not site.clipped(ready.graph.get_parameter(str(site.places[0].args[0].target))).any()
