"""The plan is decided on the graph, before any tensor moves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, cat, nn
from torch.fx import GraphModule, Node

from hadaptive_q.errors import UserError
from hadaptive_q.models.config import InputName
from hadaptive_q.quant.formats import ActivationFormat, WeightFormat
from hadaptive_q.quant.image_grid import VIEWS as IMAGE_VIEWS
from hadaptive_q.quant.plan import Plan, make_plan
from hadaptive_q.recipe import Bits, QuantizeConfig
from hadaptive_q.rewrite.deploy import deploy_graph
from hadaptive_q.rewrite.graph import ACTIVATIONS, aten, calls, constant, module_path, trace
from hadaptive_q.rewrite.products import find_products


def planned(model: nn.Module) -> tuple[Plan, dict[str, Node]]:
    graph = trace(model, 8)
    return make_plan(graph, QuantizeConfig()), {n.name: n for n in graph.graph.nodes}


def operators(nodes: dict[str, Node], names: object) -> list[str]:
    """Return what makes each tensor: an operator, or the input."""
    found = [nodes[name] for name in names]  # type: ignore[attr-defined]
    return sorted("input" if n.op == "placeholder" else str(n.target).split(".")[1] for n in found)


def scale_owner(plan: Plan, name: str) -> str:
    """Return the tensor whose scale `name` finally uses."""
    for _ in range(len(plan.shared) + 1):
        if name not in plan.shared:
            return name
        name = plan.shared[name]
    raise AssertionError(f"{name} shares in a circle")


class Chain(nn.Module):
    """Convolution, activation, pooling, views, linear: what a classifier is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.dropout, self.linear = (
            *(nn.Conv2d(3, 4, 3), nn.Hardswish(), nn.Dropout(), nn.Linear(4, 2)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.dropout(self.act(self.conv(x)).mean((-1, -2), keepdim=True).flatten(1)))


def test_tensors_are_stored_where_layers_read_and_write_them() -> None:
    plan, nodes = planned(Chain())
    made = ["conv2d", "dropout", "flatten", "hardswish", "input", "linear", "mean"]
    assert operators(nodes, plan.activations) == made, "all of it is int8"
    assert operators(nodes, plan.weights) == ["conv2d", "linear"]
    assert set(plan.activations.values()) == {ActivationFormat(8)}
    assert set(plan.weights.values()) == {WeightFormat(8)}


def test_views_carry_the_codes_of_what_they_view() -> None:
    plan, nodes = planned(Chain())
    by_operator = {str(n.target).split(".")[1]: name for name, n in nodes.items() if n.op == "call_function"}
    assert scale_owner(plan, by_operator["dropout"]) == by_operator["mean"]
    assert scale_owner(plan, by_operator["flatten"]) == by_operator["mean"]
    assert by_operator["mean"] not in plan.shared


class Scored(nn.Module):
    """A mean that float arithmetic reads, beside one for a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        mixed = nn.functional.hardswish(self.conv(x))
        return self.last(mixed.mean((-1, -2), keepdim=True)) + mixed.mean((2, 3), keepdim=True).sigmoid()[:, :2]


def test_a_mean_is_stored_where_a_layer_reads_it() -> None:
    plan, nodes = planned(Scored())
    means = [name for name, n in nodes.items() if n.target == aten.mean.dim]
    assert len(means) == 2
    assert [name in plan.activations for name in means] == [True, False]


class Rearranged(nn.Module):
    """The image as a matrix for a layer, and as another for float arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.permute(0, 2, 3, 1)).abs() + x.view(-1, 3, 64).permute(0, 2, 1)[:, :1, :1, None]


def test_a_rearranged_image_keeps_the_codes_of_the_image() -> None:
    plan, nodes = planned(Rearranged())
    assert operators(nodes, plan.activations) == ["conv2d", "input", "permute"], "what no layer reads stays in float"
    (permuted,) = (name for name in plan.activations if nodes[name].target == aten.permute.default)
    assert nodes[scale_owner(plan, permuted)].op == "placeholder"


class Readers(nn.Module):
    """Two convolutions before a Hardswish, of which one is read by something else, too."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = (nn.Conv2d(3, 3, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        two = self.two(x)
        return self.last(nn.functional.hardswish(self.one(x)) + nn.functional.hardswish(two) + two)


def test_what_only_hardswish_reads_ends_where_it_is_zero() -> None:
    plan, nodes = planned(Readers())
    ((name, floor),) = plan.floors.items()
    assert str(nodes[name].args[1]) == "one_weight"
    assert nn.functional.hardswish(torch.tensor([floor, floor - 1e-3, -100.0])).tolist() == [0, 0, 0]
    assert nn.functional.hardswish(torch.tensor(floor + 1e-3)) < 0, "higher up, values differ"


def test_floors_of_the_network_are_those_of_its_hardswishes(nano_graph: GraphModule) -> None:
    plan = make_plan(nano_graph, QuantizeConfig())
    before = {n.args[0].name for n in calls(nano_graph, *ACTIVATIONS)}  # type: ignore[union-attr]
    # Those of a Ghost block feed a Hardswish alone, too; nothing else has a floor.
    assert plan.floors.keys() == before


class Sums(nn.Module):
    """A residual, a number, a parameter: three additions, one of two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.shift = nn.Conv2d(3, 3, 1), nn.Parameter(torch.zeros(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv(x) + x).abs() + 1.0 + self.shift


def test_a_residual_is_stored_and_arithmetic_is_not() -> None:
    plan, nodes = planned(Sums())
    assert operators(nodes, plan.activations) == ["add", "conv2d", "input"]


class Joined(nn.Module):
    def __init__(self, read_by_a_layer: bool) -> None:
        super().__init__()
        self.one, self.two, self.after = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 5, 1), nn.Conv2d(9, 2, 1)
        self.read_by_a_layer = read_by_a_layer

    def forward(self, x: Tensor) -> Tensor:
        joined = cat((self.one(x), self.two(x)), dim=1)
        return self.after(joined) if self.read_by_a_layer else joined.abs()


def test_all_parts_of_a_concatenation_share_a_scale() -> None:
    plan, nodes = planned(Joined(True))
    (joined,) = (n for n in nodes.values() if n.target == aten.cat.default)
    parts = [part.name for part in joined.args[0]]  # type: ignore[union-attr]
    assert {scale_owner(plan, name) for name in (*parts, joined.name)} == {parts[0]}


def test_a_concatenation_no_layer_reads_is_arithmetic() -> None:
    plan, nodes = planned(Joined(False))
    assert "cat" not in operators(nodes, plan.activations)
    assert plan.shared == {}


class ConstantMatrix(nn.Module):
    """A sum by a matrix of ones, as the selection uses."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ones", torch.ones(1, 8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.ones)


def test_a_constant_matrix_is_no_layer() -> None:
    plan, _ = planned(ConstantMatrix())
    assert plan == Plan()


@pytest.fixture(params=["rank", "channel", "static"])
def graph(request: pytest.FixtureRequest, make_graph: Callable[..., GraphModule]) -> GraphModule:
    return make_graph(deploy_graph, request.param)


def test_every_layer_of_the_nano_network_reads_and_writes_codes(graph: GraphModule) -> None:
    plan = make_plan(graph, QuantizeConfig())
    layers = [
        n
        for n in calls(graph, aten.conv2d.default, aten.linear.default)
        if isinstance(constant(graph, n.args[1]), nn.Parameter)
    ]
    assert {n.name for n in layers} == set(plan.weights)
    for node in layers:
        assert node.name in plan.activations, node
        assert node.args[0].name in plan.activations, node  # type: ignore[union-attr]
    (output,) = (n for n in graph.graph.nodes if n.op == "output")
    assert output.args[0][0].name in plan.activations, "logits are codes too: a file is compared in them"


def test_selection_and_products_of_the_nano_network_stay_in_float(graph: GraphModule) -> None:
    plan = make_plan(graph, QuantizeConfig())
    names = {n.name: n for n in graph.graph.nodes}
    scorers = {n.name for n in graph.graph.nodes if "scorer" in module_path(n) and n.op == "call_function"}
    assert bool(scorers) == any(p.choice for p in find_products(graph))
    assert not scorers & plan.activations.keys()
    for product in find_products(graph):
        assert product.mixed in plan.activations, "X~ is read by a layer"
        assert product.normed in plan.activations, "and so is norm(Q)"
        assert product.chosen not in plan.activations, "Z is not stored: 8 bits before the product cost 12 dB"
        assert product.choice not in plan.activations
    rearranged = [n for n in names.values() if n.name in plan.activations and n.target in IMAGE_VIEWS]
    assert rearranged
    assert {names[scale_owner(plan, n.name)].op for n in rearranged} == {"placeholder"}, "and no view of a selection"
    for name in plan.activations:
        assert names[name].target not in (aten.topk.default, aten.bmm.default, aten.gather.default, aten.conv1d.default)


def test_an_owner_of_a_scale_is_stored_itself(graph: GraphModule) -> None:
    plan = make_plan(graph, QuantizeConfig())
    assert plan.shared.keys() <= plan.activations.keys()
    assert {scale_owner(plan, name) for name in plan.shared} <= plan.activations.keys()


@pytest.mark.parametrize("name", ["float32", "uint8"])
def test_four_bits_are_for_what_lies_inside(graph: GraphModule, name: InputName) -> None:
    plan = make_plan(graph, QuantizeConfig(activation_bits=4, input=name))
    nodes = {n.name: n for n in graph.graph.nodes}
    (output,) = (n for n in nodes.values() if n.op == "output")
    wide = {tensor for tensor, form in plan.activations.items() if form == ActivationFormat(8)}
    assert set(plan.activations.values()) == {ActivationFormat(4), ActivationFormat(8)}
    images = {n for n in plan.activations if nodes[scale_owner(plan, n)].op == "placeholder"}
    scored = {product.mixed for product in find_products(graph) if product.choice}
    assert images
    assert wide == images | scored | {output.args[0][0].name}  # type: ignore[index, union-attr]
    for tensor, form in plan.activations.items():
        assert plan.activations[scale_owner(plan, tensor)] == form, "one scale, one format"


def test_planning_changes_nothing(graph: GraphModule) -> None:
    code = graph.code
    assert make_plan(graph, QuantizeConfig()) == make_plan(graph, QuantizeConfig())
    assert graph.code == code


def test_four_bits_are_for_pointwise_layers_off_the_stem_and_the_scores(nano_graph: GraphModule) -> None:
    plan = make_plan(nano_graph, QuantizeConfig(pointwise_weight_bits=4))
    assert set(plan.weights.values()) == {WeightFormat(4, packed=True), WeightFormat(8)}
    scored = {product.mixed for product in find_products(nano_graph)}
    assert scored
    for node in nano_graph.graph.nodes:
        if node.name not in plan.weights:
            continue
        weight = constant(nano_graph, node.args[1])
        assert weight is not None
        mixes_channels = tuple(weight.shape[2:]) in {(), (1, 1)} and weight.shape[1] > 1
        kept = node.name in scored or module_path(node).startswith("stem.") or weight.shape[1] % 2 == 1
        small = mixes_channels and not kept
        assert plan.weights[node.name] == WeightFormat(4 if small else 8, packed=small), node.name
    named = {module_path(n) for n in nano_graph.graph.nodes if plan.weights.get(n.name) == WeightFormat(4, True)}
    assert {"head.hidden", "head.classifier", "tail.conv", "blocks.0.projection.conv"} <= named
    assert make_plan(nano_graph, QuantizeConfig()).weights == dict.fromkeys(plan.weights, WeightFormat(8))


@pytest.mark.parametrize(
    ("layer", "bits"),
    [
        (nn.Conv2d(4, 6, 1), 4),
        (nn.Conv2d(5, 6, 1), 8),
        (nn.Conv2d(4, 1, 1), 8),
        (nn.Conv2d(4, 6, 1, stride=2), 8),
        (nn.Conv2d(4, 6, 1, padding=1), 8),
        (nn.Conv2d(4, 6, 1, groups=2), 8),
        (nn.Conv2d(4, 6, 3), 8),
        (nn.Conv2d(4, 4, 1, groups=4), 8),
        (nn.Linear(8, 1), 4),
        (nn.Linear(8, 6), 4),
    ],
    ids=str,
)
def test_four_bits_are_for_what_the_runtime_has_arithmetic_for(layer: nn.Module, bits: int) -> None:
    channels = getattr(layer, "in_channels", 4)
    plan = make_plan(trace(nn.Sequential(nn.Conv2d(3, channels, 1), layer), 8), QuantizeConfig(pointwise_weight_bits=4))
    assert [form.bits for form in plan.weights.values()] == [8, bits]
    # Other layers may have as few bits, but their codes take a byte each.
    everywhere = make_plan(
        trace(nn.Sequential(nn.Conv2d(3, channels, 1), layer), 8),
        QuantizeConfig(weight_bits=3, pointwise_weight_bits=3),
    )
    assert list(everywhere.weights.values()) == [WeightFormat(3), WeightFormat(3, packed=bits == 4)]


def bits_by_layer(graph: GraphModule, config: QuantizeConfig) -> dict[str, int]:
    plan = make_plan(graph, config)
    return {module_path(n): plan.weights[n.name].bits for n in graph.graph.nodes if n.name in plan.weights}


def test_a_layer_may_be_an_exception(nano_graph: GraphModule) -> None:
    usual = bits_by_layer(nano_graph, QuantizeConfig(pointwise_weight_bits=4))
    assert usual["head.hidden"] == 4
    found = bits_by_layer(nano_graph, QuantizeConfig(pointwise_weight_bits=4, layers={"head.hidden": 8}))
    assert found == usual | {"head.hidden": 8}
    usual = bits_by_layer(nano_graph, QuantizeConfig())
    # What no recipe gives 4 bits by itself: the stem, and what scores are computed from.
    for name in ("tail.conv", "stem.1.conv", "blocks.2.expansion.pointwise"):
        assert bits_by_layer(nano_graph, QuantizeConfig(layers={name: 4})) == usual | {name: 4}


def test_a_module_stands_for_the_layers_in_it_and_the_inner_name_decides(nano_graph: GraphModule) -> None:
    usual = bits_by_layer(nano_graph, QuantizeConfig())
    inside = [name for name in usual if name.startswith("blocks.0.")]
    own = "blocks.0.projection.conv"
    assert own in inside
    assert bits_by_layer(nano_graph, QuantizeConfig(layers={"blocks.0": 3})) == usual | dict.fromkeys(inside, 3)
    for layers in ({"blocks.0": 3, own: 6}, {own: 6, "blocks.0": 3}):
        found = bits_by_layer(nano_graph, QuantizeConfig(layers=layers))
        assert found == usual | dict.fromkeys(inside, 3) | {own: 6}


@pytest.mark.parametrize(
    ("name", "bits", "hint"),
    [
        ("head.hiden", 4, "did you mean 'head.hidden'?"),
        ("blocks.22", 8, "did you mean 'blocks.2'?"),
        ("block", 4, "did you mean 'blocks'?"),
        ("stem.", 3, "got the name of no layer"),
        ("", 4, "got the name of no layer"),
    ],
)
def test_an_exception_for_no_layer(name: str, bits: Bits, hint: str, nano_graph: GraphModule) -> None:
    with pytest.raises(UserError, match=r"quantize\.layers, ") as caught:
        make_plan(nano_graph, QuantizeConfig(layers={name: bits}))
    assert hint in str(caught.value)
