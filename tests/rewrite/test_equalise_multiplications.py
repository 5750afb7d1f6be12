"""Channels of a product become even, exactly, by gains that its factor and the filters behind it share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hadaptive_q.models.families import create_model
from hadaptive_q.rewrite.deploy import deploy_graph
from hadaptive_q.rewrite.equalise_multiplications import LARGEST, equalise_multiplications
from hadaptive_q.rewrite.graph import aten, calls, trace
from hadaptive_q.rewrite.record import record

Check = Callable[[Tensor, Tensor], None]


class Product(nn.Module):
    """``P(G(x) * V x)`` with channels of very different sizes."""

    def __init__(self, uneven: tuple[float, ...] = (1, 0.5, 0.2, 0.01)) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.context, self.value = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 4, 1, bias=False)
        self.projection = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.first = nn.Conv2d(3, 4, 1)
        with torch.no_grad():
            self.value.weight.mul_(torch.tensor(uneven).reshape(-1, 1, 1, 1))

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(x)
        return self.context(x), self.value(x)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.factors(x)
        return self.projection(one * other)


def images(count: int = 8) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def sizes(graph: torch.fx.GraphModule) -> dict[str, Tensor]:
    """Return the largest magnitude of every channel of the product and of its factors."""
    (product,) = calls(graph, aten.mul.Tensor)
    names = {"product": product.name, **{f"factor {i}": node.name for i, node in enumerate(product.all_input_nodes)}}
    values = record(graph, images(), set(names.values()))
    return {label: values[name].abs().amax(dim=(0, 2, 3)) for label, name in names.items()}


def test_same_values_and_even_channels(assert_float_equal: Check) -> None:
    model = Product().eval()
    graph = trace(model, 8)
    before = sizes(graph)
    assert before["product"].max() / before["product"].min() > LARGEST
    assert equalise_multiplications(graph, [images()[:5], images()[5:]]) == 1
    after = sizes(graph)
    # All but the last reach the largest; that one would need more than the largest gain.
    torch.testing.assert_close(after["product"][:3], after["product"].max().expand(3))
    torch.testing.assert_close(after["product"][3], before["product"][3] * LARGEST)
    with torch.no_grad():
        assert_float_equal(graph(images()), model(images()))


def test_the_uneven_factor_takes_the_gain() -> None:
    """The value's channels are uneven: they become even, and the other factor stays as it was."""
    graph = trace(Product().eval(), 8)
    before = sizes(graph)
    equalise_multiplications(graph, [images()])
    after = sizes(graph)
    torch.testing.assert_close(after["factor 0"], before["factor 0"])
    assert after["factor 1"].max() / after["factor 1"].min() < before["factor 1"].max() / before["factor 1"].min() / 4


def test_a_dead_channel_keeps_its_zeros(assert_float_equal: Check) -> None:
    model = Product((1, 0.5, 0.2, 0)).eval()
    graph = trace(model, 8)
    assert equalise_multiplications(graph, [images()]) == 1
    assert sizes(graph)["product"][3] == 0
    with torch.no_grad():
        assert_float_equal(graph(images()), model(images()))


class Clamped(Product):
    """A clamp between is no place for a gain, and the other factor is read twice."""

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.factors(x)
        return self.projection(one.relu() * other) + other


class Mixed(Product):
    """What mixes channels is not divided: a scale per filter could not absorb it."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Conv2d(4, 4, 1)


class Seen(Product):
    """The product itself is an output."""

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.factors(x)
        product = one * other
        return self.projection(product) + product


@pytest.mark.parametrize("model", [Clamped(), Mixed(), Seen()])
def test_others_stay(model: nn.Module) -> None:
    graph = trace(model.eval(), 8)
    state = {name: value.clone() for name, value in graph.state_dict().items()}
    assert equalise_multiplications(graph, [images()]) == 0
    assert all(torch.equal(value, state[name]) for name, value in graph.state_dict().items())


def test_what_is_not_finite_is_left_to_calibration() -> None:
    graph = trace(Product().eval(), 8)
    state = {name: value.clone() for name, value in graph.state_dict().items()}
    bad = images()
    bad[0, 0, 0, 0] = torch.inf
    equalise_multiplications(graph, [bad])
    assert all(torch.equal(value, state[name]) for name, value in graph.state_dict().items())


def test_every_mixer_of_cas_vit_has_one(assert_float_equal: Check) -> None:
    torch.manual_seed(0)
    model, x = create_model("rcvit_nano", 5), torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        model.train()(x)
        graph = deploy_graph(model.eval(), 32)
        assert equalise_multiplications(graph, [x]) == 2
        assert_float_equal(graph(x), model(x))
