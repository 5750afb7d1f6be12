"""The deploy graph: the float network as a `torch.fx` graph of ATen operators, and the edits every rewrite needs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

aten = torch.ops.aten
HARDSWISH = (aten.hardswish.default, aten.hardswish_.default)
# Element-wise functions of a layer's result, whatever its channels; as int8 tables they cost next to nothing.
ACTIVATIONS = (*HARDSWISH, aten.gelu.default, aten.sigmoid.default)
# Those that cut values off at bounds and change nothing between.
_RELU, _RELU6 = (aten.relu.default, aten.relu_.default), (aten.relu6.default, aten.relu6_.default)
CLAMPS = (*_RELU, *_RELU6, aten.hardtanh.default, aten.hardtanh_.default)


def trace(model: nn.Module, image_size: int) -> GraphModule:
    """Return `model` (eval mode) as a graph with a free batch dimension for images `(B, 3, S, S)`.

    The graph shares no tensor with `model`, and its parameters are contiguous: weights in channels-last strides
    would be lowered as if they were not. Dropout stays in it, switched off (see `set_dropout`).
    """
    example = torch.zeros(2, 3, image_size, image_size)
    batch = torch.export.Dim("batch", min=1, max=1024)
    with torch.no_grad():
        exported = torch.export.export(model.eval(), (example,), dynamic_shapes=({0: batch},))
    graph = exported.module(check_guards=False)
    assert isinstance(graph, GraphModule)
    for name, parameter in list(graph.named_parameters()):
        _assign(graph, name, nn.Parameter(parameter.detach().clone(memory_format=torch.contiguous_format)))
    return graph


def calls(graph: GraphModule, *targets: object) -> Iterator[Node]:
    """Yield the calls of `targets` in topological order; the graph may be edited meanwhile."""
    yield from [n for n in graph.graph.nodes if n.op == "call_function" and n.target in targets]


def constant(graph: GraphModule, node: object) -> Tensor | None:
    """Return the parameter or buffer that `node` reads, or None if it is something else."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    value: object = graph
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value if isinstance(value, Tensor) else None


def split_constant(graph: GraphModule, node: Node) -> tuple[Tensor, Node] | None:
    """Return the constant and the activation of a binary operator that has one of each."""
    values = [(constant(graph, a), a) for a in node.args[:2] if isinstance(a, Node)]
    constants = [v for v, _ in values if v is not None]
    activations = [a for v, a in values if v is None]
    return (constants[0], activations[0]) if len(constants) == len(activations) == 1 else None


def clamp_bounds(node: Node) -> tuple[float, float] | None:
    """Return the least and the greatest value that one of `CLAMPS` lets pass, or None if `node` is something else."""
    if node.target in (*_RELU, *_RELU6):
        return 0.0, math.inf if node.target in _RELU else 6.0
    if node.target in CLAMPS:
        bounds: tuple[Any, ...] = (*node.args[1:], *(-1.0, 1.0)[len(node.args) - 1 :])
        return float(bounds[0]), float(bounds[1])
    return None


@dataclass(frozen=True)
class ConvSettings:
    """How a convolution steps over its input; lists are (vertical, horizontal)."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


def conv_settings(conv: Node) -> ConvSettings:
    """Return the settings of a `conv2d` call with the defaults filled in."""
    defaults: tuple[Any, ...] = (None, None, None, [1, 1], [0, 0], [1, 1], 1)
    stride, padding, dilation, groups = (*conv.args, *defaults[len(conv.args) :])[3:7]
    return ConvSettings(list(stride), list(padding), list(dilation), int(groups))


def is_depthwise(graph: GraphModule, conv: Node) -> bool:
    """Whether `conv` is a `conv2d` that filters every channel alone."""
    weight = constant(graph, conv.args[1]) if conv.target == aten.conv2d.default else None
    return weight is not None and weight.shape[1] == 1 and conv_settings(conv).groups == weight.shape[0]


def is_pointwise(graph: GraphModule, conv: Node) -> bool:
    """Whether `conv` is a `conv2d` that mixes the channels of every pixel alone: 1x1, one group, no step or padding."""
    weight = constant(graph, conv.args[1]) if conv.target == aten.conv2d.default else None
    settings = conv_settings(conv)
    plain = settings.groups == 1 and settings.stride == [1, 1] and settings.padding == [0, 0]
    return weight is not None and tuple(weight.shape[2:]) == (1, 1) and plain


def add_parameter(graph: GraphModule, name: str, value: Tensor, before: Node) -> Node:
    """Register `value` as a trainable parameter near `name` and return the node that reads it."""
    unique = _unused_name(graph, name)
    graph.register_parameter(unique, nn.Parameter(value.detach().clone(memory_format=torch.contiguous_format)))
    return _reader(graph, unique, value, before)


def add_buffer(graph: GraphModule, name: str, value: Tensor, before: Node) -> Node:
    """Register `value` as a constant near `name` and return the node that reads it."""
    unique = _unused_name(graph, name)
    graph.register_buffer(unique, value.detach().clone())
    return _reader(graph, unique, value, before)


def _unused_name(graph: GraphModule, name: str) -> str:
    base = name.replace(".", "_")
    unique, count = base, 0
    while hasattr(graph, unique):
        count += 1
        unique = f"{base}_{count}"
    return unique


def _reader(graph: GraphModule, unique: str, value: Tensor, before: Node) -> Node:
    with graph.graph.inserting_before(before):
        node = graph.graph.get_attr(unique)
    node.meta["val"] = value.detach()
    return node


def finish(graph: GraphModule) -> None:
    """Drop what no longer has a user, forget unread parameters, and recompile."""
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    read = {str(n.target) for n in graph.graph.nodes if n.op == "get_attr"}
    for name, _ in [*graph.named_parameters(), *graph.named_buffers()]:
        if name not in read:
            owner, _, leaf = name.rpartition(".")
            delattr(graph.get_submodule(owner), leaf)
    graph.graph.lint()
    graph.recompile()


def module_paths(node: Node) -> list[str]:
    """Return the dotted names of the modules that `node` came from, the outermost first."""
    return [str(path) for path, *_ in (node.meta.get("nn_module_stack") or {}).values()]


def module_path(node: Node) -> str:
    """Return the dotted name of the innermost module that `node` came from, or an empty string."""
    paths = module_paths(node)
    return paths[-1] if paths else ""


def set_dropout(graph: GraphModule, active: bool) -> None:
    """Switch dropout on or off; its probability is never touched."""
    for node in calls(graph, aten.dropout.default):
        node.update_arg(2, active)
    graph.recompile()


def _assign(root: nn.Module, name: str, value: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(owner), leaf, value)
