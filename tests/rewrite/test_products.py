"""Products are found by their shape, before and after the rewrites that give them another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from hadaptive_q.models.cross_hadamard import pair_indices
from hadaptive_q.models.hadaptive_net import HadaptiveNet
from hadaptive_q.rewrite.deploy import deploy_graph
from hadaptive_q.rewrite.fold_batch_norm import fold_batch_norm
from hadaptive_q.rewrite.graph import trace
from hadaptive_q.rewrite.products import chosen_indices, find_products, norm_of_products

NAMES = ["blocks.2.expansion", "blocks.3.expansion", "blocks.5.expansion"]


class Record(Interpreter):
    """Run a graph and keep every tensor by the name of its node."""

    def __init__(self, graph: GraphModule, inputs: Tensor) -> None:
        super().__init__(graph)
        self.values: dict[str, Tensor] = {}
        with torch.no_grad():
            self.run(inputs)

    def run_node(self, n: Node) -> object:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.values[n.name] = result
        return result


def as_model_sees_it(model: HadaptiveNet, inputs: Tensor) -> dict[str, dict[str, Tensor]]:
    """Return X~, Q and norm(Q) of every ACH as the modules compute them, by the name of the ACH."""
    found: dict[str, dict[str, Tensor]] = {name: {} for name, _ in model.ach_modules()}
    hooks = []
    for name, module in model.ach_modules():
        kept = found[name]
        hooks.append(module.bn.register_forward_hook(lambda _m, _i, out, kept=kept: kept.update(mixed=out)))
        hooks.append(
            module.norm.register_forward_hook(lambda _m, i, out, kept=kept: kept.update(product=i[0], normed=out))
        )
    with torch.no_grad():
        model(inputs)
    for hook in hooks:
        hook.remove()
    return found


def folded(model: HadaptiveNet, size: int) -> GraphModule:
    graph = trace(model, size)
    fold_batch_norm(graph)
    return graph


def close(got: Tensor, wanted: Tensor) -> bool:
    """Equal up to the order of channels, which a rewrite may change, and to float rounding."""
    return torch.allclose(
        got.sort(dim=1).values, wanted.sort(dim=1).values, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())
    )


def without_gain(slots: Tensor) -> Tensor:
    """Divide every slot by its largest value: what is left does not depend on a gain per slot."""
    flat = slots.transpose(0, 1).flatten(1)
    largest = flat.gather(1, flat.abs().argmax(dim=1, keepdim=True))
    return slots / largest.reshape(1, -1, 1, 1)


@pytest.mark.parametrize("form", [folded, deploy_graph])
@pytest.mark.parametrize("selection", ["rank", "channel", "static"])
def test_every_product_is_found_with_the_tensors_around_it(
    form: Callable[[HadaptiveNet, int], GraphModule],
    selection: str,
    make_nano: Callable[..., HadaptiveNet],
    make_graph: Callable[..., GraphModule],
    inputs: Tensor,
) -> None:
    model, graph = make_nano(selection), make_graph(form, selection)
    wanted = as_model_sees_it(model, inputs)

    products = find_products(graph)
    assert [p.name for p in products] == NAMES
    values = Record(graph, inputs).values
    for p, (_, module) in zip(products, model.ach_modules(), strict=True):
        truth = wanted[p.name]
        assert close(values[p.mixed], truth["mixed"]), f"{p.name}: mixed"
        assert close(without_gain(values[p.normed]), without_gain(truth["normed"])), f"{p.name}: normed"
        assert values[p.chosen].shape[1] == module.cs
        i, j = pair_indices(module.cs)
        assert close(values[p.chosen][:, i] * values[p.chosen][:, j], truth["product"]), f"{p.name}: chosen"
        assert (p.choice is None) == (selection == "static")
        if p.choice:
            with torch.no_grad():
                scored = module.select(module.scorer(truth["mixed"]))
            assert torch.equal(chosen_indices(values[p.choice]), scored), f"{p.name}: choice"


@pytest.mark.parametrize("selection", ["rank", "static"])
def test_norms_of_products_stand_alone(selection: str, make_graph: Callable[..., GraphModule], inputs: Tensor) -> None:
    graph = make_graph(deploy_graph, selection)
    values = Record(graph, inputs).values
    for p in find_products(graph):
        norm = norm_of_products(graph, p)
        chosen, wanted = values[p.chosen], values[p.normed]
        assert torch.equal(norm(chosen), wanted)
        pixels = chosen.permute(1, 0, 2, 3).reshape(1, chosen.shape[1], 1, -1)
        got = norm(pixels).reshape(wanted.shape[1], len(chosen), *chosen.shape[2:]).transpose(0, 1)
        assert torch.equal(got, wanted), "every pixel alone"


class NoProduct(nn.Module):
    """Selections of two tensors, and of one tensor with something else: neither is a cross-Hadamard product."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("i", torch.tensor([0, 0, 1]))
        self.register_buffer("j", torch.tensor([1, 2, 2]))

    def forward(self, x: Tensor) -> Tensor:
        y = x.relu()
        return x[:, self.i] * y[:, self.j] + x[:, self.i] * 2 + x * y


def test_other_multiplications_are_none() -> None:
    assert find_products(trace(NoProduct(), 8)) == []


def test_a_network_without_ach_has_none() -> None:
    graph = trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Hardswish(), nn.Conv2d(4, 4, 1)), 8)
    assert find_products(graph) == []
