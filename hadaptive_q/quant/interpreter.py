"""Run a quantized program on integers, as the runtime does: an executable definition of what the file will answer.

The converted graph says what to compute in dequantize -> operator -> quantize patterns and would compute it in float32;
its results differ from the file's by single codes wherever the two round differently. Here every pattern that the
runtime fuses becomes one operator of `arithmetic` on codes; the float operators between them get the runtime's order of
roundings from `float_kernels`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from hadaptive_q.quant import arithmetic, float_kernels
from hadaptive_q.quant.arithmetic import Grid, Taps
from hadaptive_q.quant.plan import PAIRWISE, WEIGHTED, stored
from hadaptive_q.quant.program import QuantizedProgram
from hadaptive_q.rewrite.clamp_codes import INT8, narrow_bounds
from hadaptive_q.rewrite.graph import (
    CLAMPS,
    HARDSWISH,
    add_buffer,
    aten,
    calls,
    clamp_bounds,
    constant,
    conv_settings,
    finish,
)

# Operators that move codes and compute nothing.
_COPIES = (
    aten.cat.default,
    aten.flatten.using_ints,
    aten.permute.default,
    aten.reshape.default,
    aten.slice.Tensor,
    aten.view.default,
    aten.view_copy.default,
)
_ON_CODES = (
    arithmetic.conv2d,
    arithmetic.linear,
    arithmetic.add,
    arithmetic.multiply,
    arithmetic.lookup,
    arithmetic.mean_hw,
    arithmetic.clamp,
)


# What the entries of an element-wise function's table are made by.
_TABLES: dict[Any, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(HARDSWISH, arithmetic.hardswish),
    aten.gelu.default: arithmetic.gelu,
    aten.sigmoid.default: arithmetic.sigmoid,
}


@dataclass(frozen=True)
class Coverage:
    """Names of the operators of a program, by what they compute on; copies and the borders between both are neither."""

    integer: tuple[str, ...]
    floating: tuple[str, ...]


class IntegerProgram:
    """A quantized program as integer arithmetic: inputs `(B, 3, S, S)` float32 -> logits `(B, classes)` float32.

    The logits lie on the output's grid; `codes` returns the codes themselves, of any quantized tensor.
    """

    def __init__(self, program: QuantizedProgram) -> None:
        self.graph = copy.deepcopy(program.graph)
        # A tensor goes by the name of what computes it, as in the plan; in the graph, its codes are what quantizes it.
        self._quantizers = {str(q.args[0]): q.name for q in calls(self.graph, _quantize())}
        self._grids = {str(q.args[0]): _grid(q) for q in calls(self.graph, _quantize())}
        _to_integers(self.graph)

    def __call__(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            out: Tensor = Interpreter(self.graph).run(inputs)
        return out

    @property
    def names(self) -> list[str]:
        """The quantized tensors, in the order of the data."""
        present = {node.name for node in self.graph.graph.nodes}
        return [name for name, quantizer in self._quantizers.items() if quantizer in present]

    def codes(self, inputs: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """Return the int8 codes of the tensors `names` for `inputs`. Raises KeyError for a name not in `names`."""
        wanted = {self._quantizers[name]: name for name in names}
        recorder = _Recorder(self.graph, wanted)
        with torch.no_grad():
            recorder.run(inputs)
        return recorder.found

    def grid(self, name: str) -> Grid:
        """Return the grid of the quantized tensor `name`. Raises KeyError for a name not in `names`."""
        return self._grids[name]

    def output_codes(self, inputs: Tensor) -> Tensor:
        """Return the codes of the logits, `(B, classes)` int8."""
        return arithmetic.quantize(self(inputs), self.output_grid)

    @property
    def output_grid(self) -> Grid:
        """The grid of the logits."""
        (output,) = (node for node in self.graph.graph.nodes if node.op == "output")
        (last,) = output.all_input_nodes
        return Grid(*last.args[1])

    @property
    def coverage(self) -> Coverage:
        """Which operators run on codes and which in float32."""
        nodes = [node for node in self.graph.graph.nodes if node.op == "call_function"]
        integer = tuple(node.name for node in nodes if node.target in _ON_CODES)
        neither = (*_COPIES, *_ON_CODES, arithmetic.quantize, arithmetic.dequantize)
        return Coverage(integer, tuple(node.name for node in nodes if node.target not in neither))


class _Recorder(Interpreter):
    """Keep the results of some nodes."""

    def __init__(self, graph: GraphModule, wanted: dict[str, str]) -> None:
        super().__init__(graph)
        self.wanted, self.found = wanted, dict[str, Tensor]()

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.name in self.wanted:
            self.found[self.wanted[n.name]] = result
        return result


def _quantize() -> Any:
    # Looked up late: the operators exist once a quantization library has registered them.
    return torch.ops.quantized_decomposed.quantize_per_tensor.default


def _to_integers(graph: GraphModule) -> None:
    """Replace, in place, every pattern by one call that makes codes from codes; its node keeps the quantizer's name."""
    for quantize in calls(graph, _quantize()):
        source, bounds = quantize.args[0], narrow_bounds(quantize)
        assert isinstance(source, Node)
        if _clamps_result(source):
            bounds = _narrower(bounds or INT8, source, _grid(quantize))
            source = source.args[0]
            assert isinstance(source, Node)
        # What has other readers than its quantizer exists in float, too: the runtime fuses neither.
        alone = _behind(source) is not None or len(source.users) == 1
        if not (alone and _fusion(source)(graph, quantize, source)):
            _set(quantize, arithmetic.quantize, source, _grid(quantize))
        if bounds:
            _clamp(graph, quantize, bounds)
    for dequantize in calls(graph, torch.ops.quantized_decomposed.dequantize_per_tensor.default):
        _set(dequantize, arithmetic.dequantize, dequantize.args[0], _grid(dequantize))
    graph.graph.eliminate_dead_code()
    for node in calls(graph, aten.mean.dim, aten.conv1d.default, *HARDSWISH):
        _in_runtime_order(graph, node)
    finish(graph)


def _clamps_result(node: Node) -> bool:
    """Whether `node` is a clamp that the operator before it takes in: nothing else reads its result."""
    source = node.all_input_nodes[0] if node.target in CLAMPS else node
    return source is not node and stored(source) is node and source.target in (*WEIGHTED, *PAIRWISE)


def _narrower(bounds: tuple[int, int], clamp: Node, grid: Grid) -> tuple[int, int] | None:
    """Return the codes that `clamp` leaves of those within `bounds`, None where these are all of int8's."""
    limits = clamp_bounds(clamp)
    assert limits is not None
    low, high = (arithmetic.code_of(limit, grid) for limit in limits)
    found = max(low, bounds[0]), min(high, bounds[1])
    return None if found == INT8 else found


def _clamp(graph: GraphModule, codes: Node, bounds: tuple[int, int]) -> None:
    with graph.graph.inserting_before(codes):
        stored = graph.graph.call_function(codes.target, codes.args)  # type: ignore[arg-type]
    _set(codes, arithmetic.clamp, stored, *bounds)


def _set(node: Node, target: Callable[..., Tensor], *args: Any) -> None:
    node.target, node.args, node.kwargs = target, args, {}


def _grid(node: Node) -> Grid:
    scale, zero_point = node.args[1:3]
    assert isinstance(scale, float)
    assert isinstance(zero_point, int)
    return Grid(scale, zero_point)


def _behind(node: object) -> tuple[Node, Grid] | None:
    """Return the codes and the grid that a dequantize operator `node` reads, or None if it is something else."""
    if not isinstance(node, Node) or node.target != torch.ops.quantized_decomposed.dequantize_per_tensor.default:
        return None
    codes = node.args[0]
    assert isinstance(codes, Node)
    return codes, _grid(node)


def _fuse_layer(graph: GraphModule, quantize: Node, layer: Node) -> bool:
    source, weight = _behind(layer.args[0]), _weight(graph, layer.args[1])
    if source is None or weight is None:
        return False
    (codes, grid), (filters, scale), out = source, weight, _grid(quantize)
    bias = constant(graph, layer.args[2]) if len(layer.args) > 2 else None
    stored = None
    if bias is not None:
        value = arithmetic.quantize_bias(bias, grid.scale, scale)
        stored = add_buffer(graph, f"{quantize.name}_bias", value, quantize)
    factor = arithmetic.multiplier(grid.scale, scale, out.scale)
    stored_factor = add_buffer(graph, f"{quantize.name}_factor", factor, quantize)
    args = (codes, filters, stored, grid.zero_point, stored_factor, out.zero_point)
    if layer.target == aten.linear.default:
        _set(quantize, arithmetic.linear, *args)
    else:
        _set(quantize, arithmetic.conv2d, *args, _taps(layer))
    return True


def _weight(graph: GraphModule, node: object) -> tuple[Node, Tensor] | None:
    """Return the codes and the scales `(C,)` of a weight, or None where it is a float."""
    if not isinstance(node, Node) or node.target != torch.ops.quantized_decomposed.dequantize_per_channel.default:
        return None
    codes, scale = node.args[0], constant(graph, node.args[1])
    assert isinstance(codes, Node)
    assert scale is not None
    return codes, scale


def _taps(conv: Node) -> Taps:
    settings = conv_settings(conv)
    (sy, sx), (py, px), (dy, dx) = settings.stride, settings.padding, settings.dilation
    return Taps((sy, sx), (py, px), (dy, dx), settings.groups)


def _fuse_binary(_: GraphModule, quantize: Node, binary: Node) -> bool:
    a, b = (_behind(argument) for argument in binary.args[:2])
    if a is None or b is None or binary.kwargs:
        return False
    function = arithmetic.add if binary.target == aten.add.Tensor else arithmetic.multiply
    _set(quantize, function, a[0], b[0], a[1], b[1], _grid(quantize))
    return True


def _fuse_table(graph: GraphModule, quantize: Node, activation: Node) -> bool:
    source = _behind(activation.args[0])
    if source is None:
        return False
    entries = arithmetic.table(_TABLES[activation.target], source[1], _grid(quantize))
    _set(quantize, arithmetic.lookup, source[0], add_buffer(graph, f"{quantize.name}_table", entries, quantize))
    return True


def _fuse_mean(_: GraphModule, quantize: Node, mean: Node) -> bool:
    source = _behind(mean.args[0])
    if source is None or not _is_over_pixels(mean):
        return False
    _set(quantize, arithmetic.mean_hw, *source, _grid(quantize))
    return True


def _is_over_pixels(mean: Node) -> bool:
    arguments: tuple[Any, ...] = mean.args
    return sorted(arguments[1]) in ([-2, -1], [2, 3]) and list(arguments[2:]) == [True]


def _fuse_copy(_: GraphModule, quantize: Node, copied: Node) -> bool:
    """Move codes instead of floats where all grids are one; elsewhere the runtime goes through float, too."""
    operands: Any = copied.args[0] if copied.target == aten.cat.default else copied.args[:1]
    sources = [_behind(operand) for operand in operands]
    if any(source is None or source[1] != _grid(quantize) for source in sources):
        return False
    codes = [source[0] for source in sources if source is not None]
    _set(quantize, copied.target, codes if copied.target == aten.cat.default else codes[0], *copied.args[1:])  # type: ignore[arg-type]
    return True


def _fuse_identity(_: GraphModule, quantize: Node, dequantize: Node) -> bool:
    """A tensor quantized twice with one grid (a dropout was between) keeps its codes."""
    codes = dequantize.args[0]
    assert isinstance(codes, Node)
    if _grid(dequantize) != _grid(quantize):
        return False
    quantize.replace_all_uses_with(codes)
    return True


def _fuse_nothing(*_: object) -> bool:
    return False


_FUSIONS: dict[Any, Callable[[GraphModule, Node, Node], bool]] = {
    aten.conv2d.default: _fuse_layer,
    aten.linear.default: _fuse_layer,
    aten.add.Tensor: _fuse_binary,
    aten.mul.Tensor: _fuse_binary,
    aten.mean.dim: _fuse_mean,
    **dict.fromkeys(_TABLES, _fuse_table),
    **dict.fromkeys(_COPIES, _fuse_copy),
}


def _fusion(source: Node) -> Callable[[GraphModule, Node, Node], bool]:
    return _fuse_identity if _behind(source) else _FUSIONS.get(source.target, _fuse_nothing)


def _in_runtime_order(graph: GraphModule, node: Node) -> None:
    """Replace a float operator whose roundings have an order, where the runtime's is known."""
    arguments: tuple[Any, ...] = node.args
    if node.target in HARDSWISH:
        _set(node, float_kernels.hardswish, arguments[0])
    elif node.target == aten.mean.dim:
        if _is_over_pixels(node):
            _set(node, float_kernels.mean_hw, arguments[0])
    else:
        x, weight, bias, stride, padding = (*arguments, *(None, [1], [0])[len(arguments) - 2 :])[:5]
        taps = constant(graph, weight)
        if taps is not None and taps.shape[:2] == (1, 1) and bias is None and list(stride) == [1]:
            _set(node, float_kernels.conv1d, x, weight, padding[0])
