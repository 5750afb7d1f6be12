"""Format, range and clipping of every site, recomputed by hand; islands are what the plan leaves in float."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from hadaptive_q.data.datasets import ImageData
from hadaptive_q.lower.parity import sqnr_db
from hadaptive_q.quant.backends import torchao_pt2e as backend
from hadaptive_q.quant.plan import Plan, make_plan
from hadaptive_q.quant.sites import Site, find_sites
from hadaptive_q.recipe import QuantizeConfig
from hadaptive_q.report.explanation import Blame, RoundedTensor
from hadaptive_q.report.measure import measure_layers, record
from hadaptive_q.report.record import LayerRecord
from hadaptive_q.report.rounding import float_islands, measure_rounding
from hadaptive_q.rewrite.deploy import deploy_graph

BLAME = Blame(alone_db=1.0, gained_db=2.0, share=0.5, held_share=0.25)


@dataclass(frozen=True)
class Case:
    deploy: GraphModule
    graph: GraphModule
    sites: list[Site]
    layers: dict[str, LayerRecord]
    found: dict[str, RoundedTensor]


@pytest.fixture(scope="module")
def case(make_graph: Callable[..., GraphModule], inputs: Tensor, few_digits: ImageData) -> Case:
    def ready() -> backend.Calibrated:
        graph = make_graph(deploy_graph)
        # A range of half the images: others are clipped.
        return backend.calibrate(backend.prepare(graph, make_plan(graph, QuantizeConfig()), "mse"), [inputs[:16]])

    deploy, calibrated = make_graph(deploy_graph), ready()
    layers = measure_layers(deploy, backend.convert(ready(), few_digits.preprocess), inputs)
    sites = find_sites(calibrated.graph)
    found = measure_rounding(calibrated.graph, sites, layers, inputs, [BLAME] * len(sites))
    assert [tensor.layer for tensor in found] == [site.layer for site in sites]
    return Case(deploy, calibrated.graph, sites, {layer.name: layer for layer in layers}, {t.name: t for t in found})


def test_activations_say_what_the_report_says(case: Case) -> None:
    activations = [tensor for tensor in case.found.values() if tensor.kind == "activation"]
    assert len(activations) == sum(site.kind == "activation" for site in case.sites)
    for tensor in activations:
        layer = case.layers[tensor.name]
        assert (tensor.sqnr_db, tensor.low, tensor.high) == (layer.sqnr_db, layer.low, layer.high)
        assert (tensor.granularity, tensor.format) == ("per tensor", "int8")
        assert tensor.scale == tensor.smallest_scale == layer.scale
        assert tensor.name in tensor.tensors
        assert tensor.blame == BLAME


def test_a_shared_scale_is_described_by_the_tensor_that_holds_all(case: Case) -> None:
    (joined,) = [t for t in case.found.values() if t.layer == "blocks.2.depthwise.act"]
    assert len(joined.tensors) == 3
    assert joined.name == joined.tensors[-1]
    parts = [case.layers[name] for name in joined.tensors[:-1]]
    assert (joined.low, joined.high) == (min(p.low for p in parts), max(p.high for p in parts))


def test_clipping_by_hand(case: Case, inputs: Tensor) -> None:
    clipped = [t for t in case.found.values() if t.kind == "activation" and t.clipped > 0]
    assert clipped, "no tensor is clipped: nothing to compare"
    for tensor in clipped[:5]:
        (site,) = [site for site in case.sites if tensor.name in site.tensors]
        values = record(case.graph, inputs, set(site.tensors))
        x = torch.cat([values[name].flatten() for name in site.tensors]).double()
        codes = (x / tensor.scale).round() + tensor.zero_point
        share = float(((codes < -128) | (codes > 127)).double().mean())
        assert tensor.clipped == pytest.approx(share, abs=1e-6)


def test_weights_by_hand(case: Case) -> None:
    weights = [tensor for tensor in case.found.values() if tensor.kind == "weight"]
    for tensor in weights:
        weight = case.graph.get_parameter(
            next(str(n.target) for n in case.graph.graph.nodes if n.name == tensor.name)
        ).detach()
        scales = weight.abs().amax(dim=tuple(range(1, weight.dim())), keepdim=True) / 127
        assert tensor.granularity == "per channel"
        assert tensor.zero_point == tensor.clipped == 0
        assert (tensor.low, tensor.high) == (float(weight.min()), float(weight.max()))
        assert (tensor.scale, tensor.smallest_scale) == pytest.approx(
            (float(scales.max()), max(float(scales.min()), torch.finfo(torch.float32).eps))
        )
        safe = scales.clamp_min(torch.finfo(torch.float32).eps)
        assert tensor.sqnr_db == pytest.approx(sqnr_db(weight, (weight / safe).round() * safe), abs=0.1)


def test_islands_are_what_the_plan_leaves_in_float(case: Case) -> None:
    plan = make_plan(case.deploy, QuantizeConfig())
    islands = {island.layer: island.operators for island in float_islands(case.deploy, plan)}
    assert "tail.act" not in islands, "what only layers read runs on codes"
    assert islands["blocks.2.expansion.scorer"] == {"mean": 1, "conv1d": 1}
    assert "bmm" in islands["blocks.2.expansion"]
    assert islands["blocks.2.expansion.norm"].keys() >= {"abs", "div"}
    assert not {layer for layer in islands if layer.endswith((".conv", "projection"))}
    everything = float_islands(case.deploy, Plan())
    assert sum(sum(island.operators.values()) for island in everything) > sum(sum(i.values()) for i in islands.values())
