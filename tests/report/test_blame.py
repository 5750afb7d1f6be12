"""Blame against runs of the whole graph, one by one, with the switches set by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from hadaptive_q.quant.backends import torchao_pt2e as backend
from hadaptive_q.quant.plan import make_plan
from hadaptive_q.quant.sites import Site, find_sites
from hadaptive_q.recipe import QuantizeConfig
from hadaptive_q.report.blame import Blames, measure_blame
from hadaptive_q.rewrite import kept_run
from hadaptive_q.rewrite.deploy import deploy_graph
from hadaptive_q.rewrite.products import find_products

# The input, a weight, a scale that several tensors share, an ACH's X~, its products, and the logits.
ASKED = 6


def simulated(graph: GraphModule, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = graph(inputs)
    return out


def noise(reference: Tensor, noisy: Tensor) -> float:
    return float(((reference - noisy).double() ** 2).sum())


def decibels(reference: Tensor, noisy: Tensor) -> float:
    return 10 * math.log10(noise(reference, torch.zeros_like(reference)) / noise(reference, noisy))


@pytest.fixture(scope="module", params=["rank", "static"])
def case(
    request: pytest.FixtureRequest, make_graph: Callable[..., GraphModule], inputs: Tensor
) -> tuple[GraphModule, list[Site], list[Site], set[str]]:
    graph = make_graph(deploy_graph, request.param)
    choices = {p.choice for p in find_products(graph) if p.choice}
    assert bool(choices) == (request.param == "rank")
    ready = backend.calibrate(backend.prepare(graph, make_plan(graph, QuantizeConfig()), "mse"), [inputs])
    sites = find_sites(ready.graph)
    asked = [
        sites[0],
        next(s for s in sites if s.kind == "weight" and s.layer == "blocks.1.projection.conv"),
        next(s for s in sites if s.layer == "blocks.2.depthwise.act" and len(s.tensors) > 1),
        next(s for s in sites if s.kind == "activation" and s.layer == "blocks.2.expansion.pointwise"),
        next(s for s in sites if s.layer == "blocks.5.expansion.norm"),
        next(s for s in sites if s.kind == "activation" and s.layer == "head.classifier"),
    ]
    return ready.graph, sites, asked, choices


@pytest.fixture(scope="module")
def blames(case: tuple[GraphModule, list[Site], list[Site], set[str]], inputs: Tensor) -> Blames:
    graph, sites, asked, choices = case
    return measure_blame(graph, sites, asked, choices, inputs)


@pytest.mark.parametrize("index", range(ASKED))
def test_one_site_against_whole_runs(
    index: int, case: tuple[GraphModule, list[Site], list[Site], set[str]], blames: Blames, inputs: Tensor
) -> None:
    graph, sites, asked, choices = case
    rounded = simulated(graph, inputs)
    for site in sites:
        site.switch(False)
    plain = simulated(graph, inputs)
    asked[index].switch(True)
    alone = simulated(graph, inputs)
    for site in sites:
        site.switch(site is not asked[index])
    without = simulated(graph, inputs)
    asked[index].switch(True)

    found = blames.sites[index]
    assert found.alone_db == pytest.approx(decibels(plain, alone), abs=1e-3)
    assert found.gained_db == pytest.approx(decibels(plain, without) - decibels(plain, rounded), abs=1e-3)
    assert found.share == pytest.approx(noise(plain, alone) / noise(plain, rounded), rel=1e-3)
    if not choices:
        assert found.held_share == found.share
    assert torch.equal(blames.plain, plain)
    assert torch.equal(blames.rounded, rounded)


def test_held_selections_are_those_of_the_plain_run(
    case: tuple[GraphModule, list[Site], list[Site], set[str]], blames: Blames, inputs: Tensor
) -> None:
    """By hand: the choices of the plain run put in place of what another run computes."""
    graph, sites, asked, choices = case
    if not choices:
        assert torch.equal(blames.held, blames.rounded)
        return
    interpreter = kept_run.KeptRun
    for site in sites:
        site.switch(False)
    plain = interpreter(graph, inputs)
    kept = {node: value for node, value in plain.kept.items() if node.name in choices}
    for site in sites:
        site.switch(True)
    wanted = torch.fx.Interpreter(graph, garbage_collect_values=False).run(inputs, initial_env=dict(kept))
    assert torch.equal(blames.held, wanted)
    assert not torch.equal(blames.held, blames.rounded)  # some image swaps a channel
    for site in sites:
        site.switch(site is asked[0])
    alone = torch.fx.Interpreter(graph, garbage_collect_values=False).run(inputs, initial_env=dict(kept))
    for site in sites:
        site.switch(True)
    share = noise(plain.logits, alone) / noise(plain.logits, blames.rounded)
    assert blames.sites[0].held_share == pytest.approx(share, rel=1e-3)


def test_behind_the_last_selection_held_makes_no_difference(blames: Blames) -> None:
    assert blames.sites[-1].held_share == blames.sites[-1].share


def test_batches_do_not_matter(
    case: tuple[GraphModule, list[Site], list[Site], set[str]], inputs: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, sites, asked, choices = case
    # Convolutions that take images one by one: others sum in an order that depends on the batch, and swap equal ranks.
    with torch.backends.mkldnn.flags(enabled=False):
        whole = measure_blame(graph, sites, asked[:2], choices, inputs)
        monkeypatch.setattr(kept_run, "PIXELS", 12 * inputs[0, 0].numel())
        again = measure_blame(graph, sites, asked[:2], choices, inputs)
    torch.testing.assert_close(again.rounded, whole.rounded)
    for got, wanted in zip(again.sites, whole.sites, strict=True):
        assert got.share == pytest.approx(wanted.share, rel=0.05)


def test_everything_rounds_afterwards(
    case: tuple[GraphModule, list[Site], list[Site], set[str]], blames: Blames, inputs: Tensor
) -> None:
    graph, sites, *_ = case
    assert all(site.quantizer.fake_quant_enabled[0] for site in sites)
    assert torch.equal(simulated(graph, inputs), blames.rounded)
