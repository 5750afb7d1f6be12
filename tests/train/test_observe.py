"""What a loss sees of a network is the same for the float network and for its deploy graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from hadaptive_q.models.hadaptive_net import HadaptiveNet
from hadaptive_q.rewrite.deploy import deploy_graph
from hadaptive_q.train.observe import ObservedGraph, ObservedModel

Close = Callable[[Tensor, Tensor], None]


@pytest.mark.parametrize("selection", ["rank", "channel", "static"])
def test_graph_and_network_show_the_same(
    selection: str,
    make_nano: Callable[..., HadaptiveNet],
    make_graph: Callable[..., GraphModule],
    inputs: Tensor,
    assert_float_equal: Close,
) -> None:
    model, graph = make_nano(selection), make_graph(deploy_graph, selection)
    with torch.no_grad():
        wanted = ObservedModel(model)(inputs)
        got = ObservedGraph(graph)(inputs)
        assert_float_equal(got.logits, model(inputs))
    assert len(wanted.features) == len(got.features) == len(model.config.blocks)
    for one, other in zip(wanted.features, got.features, strict=True):
        assert_float_equal(other, one)
    choosing = 0 if selection == "static" else len(list(model.ach_modules()))
    assert len(wanted.scores) == len(got.scores) == choosing
    for one, other in zip(wanted.scores, got.scores, strict=True):
        assert_float_equal(other, one)
    assert len(ObservedModel(model).choices) == choosing


def test_larger_weights_of_the_scorer_change_no_score(nano: HadaptiveNet, inputs: Tensor) -> None:
    with torch.no_grad():
        before = ObservedModel(nano)(inputs).scores
        for _, ach in nano.ach_modules():
            ach.scorer.weight.mul_(7)
        after = ObservedModel(nano)(inputs).scores
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-6)


def test_no_hook_stays(nano: HadaptiveNet, inputs: Tensor) -> None:
    ObservedModel(nano)(inputs)
    assert not any(module._forward_hooks for module in nano.modules())


def test_no_hook_stays_after_a_failure(nano: HadaptiveNet) -> None:
    with pytest.raises(RuntimeError):
        ObservedModel(nano)(torch.zeros(1, 7, 32, 32))
    assert not any(module._forward_hooks for module in nano.modules())


def test_the_graph_is_shared_not_copied(nano_graph: GraphModule, inputs: Tensor) -> None:
    observed = ObservedGraph(nano_graph)
    assert {id(p) for p in observed.parameters()} == {id(p) for p in nano_graph.parameters()}
    before = nano_graph(inputs)
    observed(inputs).logits.sum().backward()
    with torch.no_grad():
        for parameter in observed.parameters():
            if parameter.grad is not None:
                parameter.sub_(1e-3 * parameter.grad)
    assert not torch.equal(nano_graph(inputs), before)


def test_the_margin_reaches_the_scorer_of_a_graph(nano_graph: GraphModule, inputs: Tensor) -> None:
    observed = ObservedGraph(nano_graph)
    sum(scores.square().sum() for scores in observed(inputs).scores).backward()  # type: ignore[union-attr]
    moved = [name for name, p in nano_graph.named_parameters() if "scorer" in name and p.grad is not None]
    assert len(moved) == 3
    assert isinstance(observed, nn.Module)
