"""The deploy form as a whole: float-equal after every step, trainable, and cut loose from the model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from hadaptive_q.models.families import create_model
from hadaptive_q.models.hadaptive_net import HadaptiveNet
from hadaptive_q.rewrite.deploy import REWRITES, deploy_graph
from hadaptive_q.rewrite.graph import aten, calls, module_path, set_dropout, trace

Check = Callable[[Tensor, Tensor], None]


@pytest.mark.parametrize("selection", ["rank", "channel", "static"])
def test_every_rewrite_in_turn_leaves_the_output(
    selection: str,
    make_nano: Callable[..., HadaptiveNet],
    make_graph: Callable[..., GraphModule],
    inputs: Tensor,
    assert_float_equal: Check,
) -> None:
    model, graph = make_nano(selection), make_graph(trace, selection)
    with torch.no_grad():
        wanted = model(inputs)
        torch.testing.assert_close(graph(inputs), wanted, rtol=1e-6, atol=1e-6)
        for rewrite in REWRITES:
            rewrite(graph)
            assert_float_equal(graph(inputs), wanted)
            code = graph.code
            assert rewrite(graph) == 0, f"{rewrite.__name__} finds its own results"
            assert graph.code == code


def test_any_batch_size_runs_and_batches_are_their_images(
    nano: HadaptiveNet, nano_graph: GraphModule, inputs: Tensor
) -> None:
    with torch.no_grad():
        wanted = nano(inputs)
        tolerance = 1e-5 * float(wanted.abs().max())
        for batch in (1, 2, 3, 32):
            got = torch.cat([nano_graph(part) for part in inputs.split(batch)])
            assert float((got - wanted).abs().max()) <= tolerance, f"batch {batch}"


def test_no_batch_norm_and_nothing_unread_is_left(nano_graph: GraphModule) -> None:
    assert not list(calls(nano_graph, aten.batch_norm.default))
    read = {str(n.target) for n in nano_graph.graph.nodes if n.op == "get_attr"}
    assert {name for name, _ in nano_graph.named_parameters()} <= read
    assert {name for name, _ in nano_graph.named_buffers()} <= read


def test_every_operator_knows_the_module_it_came_from(nano: HadaptiveNet, nano_graph: GraphModule) -> None:
    modules = {name for name, _ in nano.named_modules()}
    paths = {module_path(n) for n in nano_graph.graph.nodes if n.op == "call_function"}
    assert "" not in paths
    assert paths <= modules


def test_graph_and_model_share_no_tensor(nano: HadaptiveNet, inputs: Tensor) -> None:
    before = copy.deepcopy(nano.state_dict())
    graph = deploy_graph(nano, 32)
    with torch.no_grad():
        for parameter in graph.parameters():
            parameter.add_(1)
    after = nano.state_dict()
    assert all(torch.equal(tensor, after[name]) or tensor.isnan().all() for name, tensor in before.items())


def test_everything_that_trains_in_the_model_trains_in_the_graph(nano: HadaptiveNet) -> None:
    graph = deploy_graph(nano, 64)  # at 32 the last stage has 2 x 2 pixels, which most of a 7x7 kernel never meets
    torch.manual_seed(0)
    graph(torch.randn(4, 3, 64, 64)).square().sum().backward()
    idle = {name for name, p in graph.named_parameters() if p.grad is None or not p.grad.any()}
    # The scorer chooses; at inference no gradient passes through a choice.
    assert all("scorer" in name for name in idle), idle
    assert len(idle) <= 3
    assert all(p.grad is None or p.grad.isfinite().all() for p in graph.parameters())


def test_dropout_is_there_switched_off_with_its_probability(nano_graph: GraphModule, inputs: Tensor) -> None:
    (dropout,) = calls(nano_graph, aten.dropout.default)
    assert dropout.args[1:] == (0.3, False)
    with torch.no_grad():
        still = nano_graph(inputs)
        set_dropout(nano_graph, active=True)
        assert (dropout.args[1], dropout.args[2]) == (0.3, True)
        assert not torch.equal(nano_graph(inputs), still)
        set_dropout(nano_graph, active=False)
        assert torch.equal(nano_graph(inputs), still)


@pytest.mark.parametrize("size", [16, 80])
def test_other_image_sizes(size: int, nano: HadaptiveNet, assert_float_equal: Check) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(4, 3, size, size)
    with torch.no_grad():
        assert_float_equal(deploy_graph(nano, size)(inputs), nano(inputs))


def test_another_size_than_it_was_made_for_is_refused(nano_graph: GraphModule) -> None:
    with pytest.raises(RuntimeError):
        nano_graph(torch.zeros(2, 3, 48, 48))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hadaptive_net_s", "hadaptive_net_m", "hadaptive_net_l"])
def test_the_published_variants(name: str, assert_float_equal: Check) -> None:
    torch.manual_seed(0)
    model = create_model(name, 10)
    inputs = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for _ in range(10):
            model.train()(inputs)
        assert_float_equal(deploy_graph(model.eval(), 64)(inputs), model(inputs))
