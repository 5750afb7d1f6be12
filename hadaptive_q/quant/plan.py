"""The plan: which tensors of the deploy graph are stored in which format, decided before any tensor moves.

A tensor is quantized once, where it is made, and every reader sees the same codes. Quantized are the inputs
and outputs of convolutions, linears, residual additions, element-wise products of what layers made, concatenations, and
means before a layer; views share their source's codes, and of a result that only a clamp reads, the clamped values are
stored. Everything else stays in float: the scores that select channels, the products of selected channels and their
norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from hadaptive_q.errors import UserError, nearest
from hadaptive_q.quant.formats import ActivationFormat, WeightFormat
from hadaptive_q.quant.image_grid import PIXEL_RANGE, rearranged
from hadaptive_q.recipe import Bits, QuantizeConfig
from hadaptive_q.rewrite.graph import ACTIVATIONS, CLAMPS, HARDSWISH, aten, constant, is_pointwise, module_path
from hadaptive_q.rewrite.products import find_products

WEIGHTED = (aten.conv2d.default, aten.linear.default)
PAIRWISE = (aten.add.Tensor, aten.mul.Tensor)
VIEWS = (aten.flatten.using_ints, aten.dropout.default)
# Few weights, which the whole network's precision hangs on.
STEM = "stem."
# What takes no part in a choice of fewer bits for activations.
FULL = ActivationFormat()
# From here down a function's values are one: Hardswish is 0, and GELU less than half a code of any range above 0.07.
FLOORS = {**dict.fromkeys(HARDSWISH, -3.0), aten.gelu.default: -4.0}


@dataclass(frozen=True)
class Plan:
    """Formats by node name. `shared` maps a tensor to the one whose scale it uses.

    `ranges` are those known before any image is seen: never calibrated, never learned.
    `floors` are values below which nobody tells a tensor's values apart: its codes need not reach further down.
    """

    activations: dict[str, ActivationFormat] = field(default_factory=dict)
    weights: dict[str, WeightFormat] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    floors: dict[str, float] = field(default_factory=dict)
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)


def make_plan(graph: GraphModule, config: QuantizeConfig) -> Plan:
    """Resolve `config` on the deploy graph `graph`.

    Raises UserError where `config.layers` names no layer.
    """
    activation = ActivationFormat(config.activation_bits)
    plan = Plan()
    scored = {product.mixed for product in find_products(graph) if product.choice}
    fixed = exceptions(graph, config.layers)
    for node in graph.graph.nodes:
        if _is_weighted(graph, node):
            able = takes_four_bits(graph, node)
            small = able and node.name not in scored and not module_path(node).startswith(STEM)
            bits = fixed.get(node.name, config.pointwise_weight_bits if small else config.weight_bits)
            plan.weights[node.name] = WeightFormat(bits, packed=able and bits <= 4)
        if not _computes_on_codes(graph, node):
            continue
        for tensor in (*_activation_inputs(node), stored(node)):
            plan.activations[tensor.name] = activation
    image = next(node for node in graph.graph.nodes if node.op == "placeholder")
    # Of other views only those of the image: the reshapes of a selection carry floats.
    views = {*rearranged(image)} - {image}
    # Views first seen from their reader: the tensor behind them carries the same codes.
    for node in reversed(graph.graph.nodes):
        if node.name in plan.activations and (node.target in VIEWS or node in views):
            plan.activations[node.args[0].name] = activation
            plan.shared[node.name] = node.args[0].name
    for node in graph.graph.nodes:
        if node.target == aten.cat.default and node.name in plan.activations:
            first, *rest = node.args[0]
            plan.shared.update({tensor.name: first.name for tensor in (*rest, node)})
    owners = plan.activations.keys() - plan.shared.keys() - set(plan.shared.values())
    for node in graph.graph.nodes:
        if node.name in owners and node.users and all(user.target in FLOORS for user in node.users):
            plan.floors[node.name] = min(FLOORS[user.target] for user in node.users)
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    _keep_eight_bits(plan, {node.name for node in (*views, image, *output.all_input_nodes)} | scored)
    if config.input != "float32":
        forms = [node.name for node in rearranged(image) if node.name in plan.activations]
        plan.ranges.update({name: PIXEL_RANGE for name in forms if name not in plan.shared})
    return plan


def stored(node: Node) -> Node:
    """Return the tensor that is stored of what `node` computes: the values clamped, where a clamp alone reads them."""
    (reader, *others) = node.users or (node,)
    return reader if not others and reader.target in CLAMPS else node


def _keep_eight_bits(plan: Plan, names: set[str]) -> None:
    """Give `names` and what shares a scale with them the format of 8 bits."""
    owners = {_owner(plan, name) for name in names}
    plan.activations.update({name: FULL for name in plan.activations if _owner(plan, name) in owners})


def _owner(plan: Plan, name: str) -> str:
    """Return the tensor whose scale `name` has in the end."""
    while name in plan.shared:
        name = plan.shared[name]
    return name


def _is_weighted(graph: GraphModule, node: Node) -> bool:
    # A constant matrix (the sum over ranks, say) is float arithmetic, not a layer.
    return node.target in WEIGHTED and isinstance(constant(graph, node.args[1]), nn.Parameter)


def takes_four_bits(graph: GraphModule, node: Node) -> bool:
    """Whether `node` is a layer for which the runtime has arithmetic with 4-bit weights."""
    weight = constant(graph, node.args[1]) if _is_weighted(graph, node) else None
    if weight is None:
        return False
    rows, columns = weight.shape[:2]
    # Rows of an odd number of columns: the ahead-of-time code pads each to whole bytes, the runtime reads on.
    # One row: it loses its dimension on the way, unless it is a linear's.
    if columns % 2:
        return False
    return node.target == aten.linear.default or (rows > 1 and is_pointwise(graph, node))


def exceptions(graph: GraphModule, layers: Mapping[str, Bits]) -> dict[str, Bits]:
    """Return the bits that `layers` gives to single nodes; of two names around a layer, the inner one decides."""
    found: dict[str, Bits] = {}
    weighted = [node for node in graph.graph.nodes if _is_weighted(graph, node)]
    for name, bits in sorted(layers.items(), key=lambda item: item[0].count(".")):
        inside = [node.name for node in weighted if f"{module_path(node)}.".startswith(f"{name}.")]
        if not inside:
            parts = [module_path(node).split(".") for node in weighted]
            known = {".".join(path[:depth]) for path in parts for depth in range(1, len(path) + 1)}
            wanted = "a layer of the network, such as head.classifier, or a module around some"
            raise UserError(f"quantize.layers, {name}", "the name of no layer", wanted, nearest(name, known))
        found.update(dict.fromkeys(inside, bits))
    return found


def _computes_on_codes(graph: GraphModule, node: Node) -> bool:
    if _is_weighted(graph, node):
        return True
    if node.target == aten.cat.default:
        # Where a layer reads it; the concatenations inside a product are float arithmetic.
        return any(_is_weighted(graph, user) for user in node.users)
    if node.target == aten.mean.dim:
        # The mean before a layer; the one that scores channels needs more than 8 bits.
        return _feeds_layer(graph, node) and _made_by_layer(graph, node.args[0])
    # A residual adds what two layers made, a gate multiplies it; the additions inside a norm or a selection and the
    # products of selected channels are float arithmetic.
    return node.target in PAIRWISE and all(_made_by_layer(graph, argument) for argument in node.args)


def _made_by_layer(graph: GraphModule, node: object) -> bool:
    """Whether `node` is a layer's result, as it is or behind activations, concatenations and residual additions."""
    if not isinstance(node, Node):
        return False
    if node.op == "placeholder" or _is_weighted(graph, node):
        return True
    if node.target in (*ACTIVATIONS, *CLAMPS, aten.cat.default, *PAIRWISE, *VIEWS):
        return all(_made_by_layer(graph, source) for source in node.all_input_nodes)
    return False


def _feeds_layer(graph: GraphModule, node: Node) -> bool:
    """Whether layers alone read `node`, as it is or through views."""
    return bool(node.users) and all(
        _is_weighted(graph, user) or (user.target in VIEWS and _feeds_layer(graph, user)) for user in node.users
    )


def _activation_inputs(node: Node) -> list[Node]:
    arguments: Any = node.args[0] if node.target == aten.cat.default else node.args
    if node.target in WEIGHTED:
        arguments = node.args[:1]
    return [argument for argument in arguments if isinstance(argument, Node) and argument.op != "get_attr"]
