"""Every integer operator against a file of that operator alone, run by the runtime: the same codes, all of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Registers the quantize and dequantize operators that the modules below are written in.
import hadaptive_q.quant.backends.torchao_pt2e  # noqa: F401
from hadaptive_q.lower.executorch import lower
from hadaptive_q.lower.runtime import PteFile
from hadaptive_q.quant import arithmetic, float_kernels
from hadaptive_q.quant.arithmetic import Grid, Taps

Q = torch.ops.quantized_decomposed
EVERY = torch.arange(-128, 128, dtype=torch.int8)


class SideBySide(nn.Module):
    """Many small operators in one file, which takes as long to lower as one: each reads its part of a vector."""

    def __init__(self, parts: list[nn.Module], shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.parts, self.shapes = nn.ModuleList(parts), shapes

    def forward(self, x: Tensor) -> Tensor:
        pieces = x.split([math.prod(shape) for shape in self.shapes], dim=1)
        results = [
            part(piece.reshape(1, *shape)) for part, piece, shape in zip(self.parts, pieces, self.shapes, strict=True)
        ]
        return torch.cat([result.flatten(1) for result in results], dim=1)


def run(path: Path, parts: list[nn.Module], inputs: list[Tensor]) -> list[Tensor]:
    """Lower `parts`, each for one of `inputs` `(N, ...)`, and return what the file gives for N samples."""
    module = SideBySide(parts, [tuple(x.shape[1:]) for x in inputs]).eval()
    flat = torch.cat([x.flatten(1) for x in inputs], dim=1)
    with torch.no_grad():
        sizes = [part(x[:1]).numel() for part, x in zip(parts, inputs, strict=True)]
        lowered = lower(torch.export.export(module, (flat[:1],)))
    assert set(lowered.coverage.portable_ops) <= {"split_with_sizes_copy", "split_copy", "getitem"}
    path.write_bytes(lowered.data)
    file = PteFile(path)
    return list(torch.cat([file(x) for x in flat.split(1)]).split(sizes, dim=1))


def through(x: Tensor, grid: Grid) -> Tensor:
    """Quantize and dequantize `x`, in operators that lowering recognises."""
    codes = Q.quantize_per_tensor(x, grid.scale, grid.zero_point, -128, 127, torch.int8)
    out: Tensor = Q.dequantize_per_tensor(codes, grid.scale, grid.zero_point, -128, 127, torch.int8)
    return out


class Layer(nn.Module):
    """quantize -> convolution or linear with int8 weights -> quantize; dequantized in between, as converted."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, source: Grid, out: Grid, taps: Taps) -> None:
        super().__init__()
        self.source, self.out, self.taps = source, out, taps
        self.register_buffer("codes", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("zeros", torch.zeros(len(scale), dtype=torch.int64))
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        weight = Q.dequantize_per_channel(self.codes, self.scale, self.zeros, 0, -127, 127, torch.int8)
        x = through(x, self.source)
        if self.codes.dim() == 2:
            return through(F.linear(x, weight, self.bias), self.out)
        return through(F.conv2d(x, weight, self.bias, *self.taps), self.out)

    def wanted(self, x: Tensor) -> Tensor:
        codes = arithmetic.quantize(x, self.source)
        bias = None
        if self.bias is not None:
            bias = arithmetic.quantize_bias(self.bias, self.source.scale, self.scale)
        factor = arithmetic.multiplier(self.source.scale, self.scale, self.out.scale)
        args = (codes, self.codes, bias, self.source.zero_point, factor, self.out.zero_point)
        found = arithmetic.linear(*args) if self.codes.dim() == 2 else arithmetic.conv2d(*args, self.taps)
        return arithmetic.dequantize(found, self.out)


SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...], Taps]] = {
    "pointwise": ((24, 40, 1, 1), (40, 6, 5), Taps()),
    "stride 2": ((20, 12, 2, 2), (12, 8, 8), Taps(stride=(2, 2))),
    "padded": ((8, 12, 3, 3), (12, 7, 7), Taps(padding=(1, 1))),
    "depthwise 3x3": ((40, 1, 3, 3), (40, 7, 7), Taps(padding=(1, 1), groups=40)),
    "depthwise 5x5": ((24, 1, 5, 5), (24, 6, 6), Taps(padding=(2, 2), groups=24)),
    "depthwise 7x7": ((8, 1, 7, 7), (8, 7, 7), Taps(padding=(3, 3), groups=8)),
    "depthwise 3x7, padded on one side only": ((16, 1, 3, 7), (16, 6, 6), Taps(padding=(0, 3), groups=16)),
    "depthwise stride 2": ((16, 1, 2, 2), (16, 6, 6), Taps(stride=(2, 2), groups=16)),
    "linear": ((30, 48), (48,), Taps()),
    "linear beyond 24 bits": ((60, 1280), (1280,), Taps()),
}


def make_layer(name: str, with_bias: bool, generator: torch.Generator) -> Layer:
    shape, _, taps = SHAPES[name]
    lowest = 100 if name == "linear beyond 24 bits" else -127
    weight = torch.randint(lowest, 128, shape, generator=generator, dtype=torch.int8)
    assert arithmetic.exact_dtype(weight) == (torch.float64 if lowest > 0 else torch.float32)
    scale = torch.rand(shape[0], generator=generator) * 0.01 + 0.002
    source, fan_in = Grid(0.0371, -17), math.prod(shape[1:])
    spread = 0.007 * (fan_in * 4 / 60 if lowest > 0 else 73 * 2 * fan_in**0.5 / 30)
    bias = torch.randn(shape[0], generator=generator) if with_bias else None
    return Layer(weight, scale, bias, source, Grid(spread * (113 if lowest > 0 else 1), 9), taps)


def test_layers(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    cases = [*((name, True) for name in SHAPES), ("pointwise", False), ("padded", False), ("linear", False)]
    layers = [make_layer(*case, generator) for case in cases]
    inputs = [torch.randn((8, *SHAPES[name][1]), generator=generator) * 2 + 1 for name, _ in cases]
    for case, layer, x, found in zip(cases, layers, inputs, run(tmp_path / "file.pte", layers, inputs), strict=True):
        wanted = layer.wanted(x).flatten(1)
        assert torch.equal(wanted, found), case
        assert len(wanted.unique()) > 20, f"{case}: too few codes to tell"


class Add(nn.Module):
    def __init__(self, a: Grid, b: Grid, out: Grid) -> None:
        super().__init__()
        self.grids = a, b, out

    def forward(self, x: Tensor) -> Tensor:
        a, b, out = self.grids
        return through(through(x[:, :1], a) + through(x[:, 1:], b), out)


ADDITIONS = [
    (Grid(0.05, 3), Grid(0.07, -20), Grid(0.09, -5)),
    (Grid(0.031, -128), Grid(0.0007, 127), Grid(0.03, 0)),
    (Grid(0.5, 0), Grid(0.25, 0), Grid(0.5, 0)),  # half of the results are ties
    (Grid(0.001, 10), Grid(0.002, -10), Grid(0.9, 7)),
    (Grid(0.9, 10), Grid(0.8, -10), Grid(0.01, 7)),
]


def test_ties_of_an_addition_round_up() -> None:
    half, one = Grid(0.5, 0), Grid(1.0, 0)
    odd = torch.tensor([-3, -1, 1, 3], dtype=torch.int8)
    assert arithmetic.add(odd, torch.zeros_like(odd), half, half, one).tolist() == [-1, 0, 1, 2]


def test_additions_out_of_range_are_refused() -> None:
    codes = torch.zeros(1, dtype=torch.int8)
    for ratio in (2.0**-11, 2.0**8):
        with pytest.raises(ValueError, match="outside"):
            arithmetic.add(codes, codes, Grid(ratio, 0), Grid(1.0, 0), Grid(1.0, 0))


class Table(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor], source: Grid, out: Grid) -> None:
        super().__init__()
        self.function, self.source, self.out = function, source, out

    def forward(self, x: Tensor) -> Tensor:
        return through(self.function(through(x, self.source)), self.out)


FUNCTIONS = [
    (F.hardswish, arithmetic.hardswish),
    (F.gelu, arithmetic.gelu),
    (torch.sigmoid, arithmetic.sigmoid),
]


TABLES = [
    (Grid(0.06308966875076294, 6), Grid(0.03138378635048866, -116)),
    (Grid(0.0675806999206543, 7), Grid(0.034051865339279175, -117)),
    (Grid(0.25, 1), Grid(0.125, -3)),
    (Grid(0.001, 100), Grid(0.0005, 20)),
    (Grid(3.0, -100), Grid(1.0, 127)),
]


def test_additions_of_all_pairs_of_codes_and_tables(tmp_path: Path) -> None:
    first, second = EVERY.repeat_interleave(256), EVERY.repeat(256)
    pairs = [torch.stack((arithmetic.dequantize(first, a), arithmetic.dequantize(second, b))) for a, b, _ in ADDITIONS]
    inputs = [x.reshape(1, 2, 256, 256) for x in pairs]
    parts: list[nn.Module] = [Add(*grids) for grids in ADDITIONS]
    wanted = [(arithmetic.add(first, second, *grids), grids[-1]) for grids in ADDITIONS]
    for (operator, function), (source, out) in itertools.product(FUNCTIONS, TABLES):
        inputs.append(arithmetic.dequantize(EVERY, source).reshape(1, 4, 8, 8))
        parts.append(Table(operator, source, out))
        wanted.append((arithmetic.lookup(EVERY, arithmetic.table(function, source, out)), out))
    for (codes, out), found in zip(wanted, run(tmp_path / "file.pte", parts, inputs), strict=True):
        assert torch.equal(arithmetic.dequantize(codes, out), found[0]), out


class Multiply(Add):
    def forward(self, x: Tensor) -> Tensor:
        a, b, out = self.grids
        return through(through(x[:, :1], a) * through(x[:, 1:], b), out)


MULTIPLICATIONS = [
    (Grid(0.05, 3), Grid(0.07, -20), Grid(0.2, -5)),
    (Grid(0.031, -128), Grid(1 / 255, -128), Grid(0.03, 0)),  # a gate from 0 to 1
    (Grid(0.5, 0), Grid(0.25, 0), Grid(0.25, 0)),  # half of the results are ties
    (Grid(0.5, 7), Grid(0.25, -9), Grid(0.25, 1)),
    (Grid(0.001, 127), Grid(0.002, -128), Grid(0.1, 7)),  # close to the smallest ratio, hardly two codes
    (Grid(0.9, 10), Grid(0.8, -10), Grid(0.01, 7)),  # nearly everything is clipped
]


def test_multiplications_of_all_pairs_of_codes(tmp_path: Path) -> None:
    first, second = EVERY.repeat_interleave(256), EVERY.repeat(256)
    pairs = [
        torch.stack((arithmetic.dequantize(first, a), arithmetic.dequantize(second, b))) for a, b, _ in MULTIPLICATIONS
    ]
    inputs = [x.reshape(1, 2, 256, 256) for x in pairs]
    parts = [Multiply(*grids) for grids in MULTIPLICATIONS]
    for grids, found in zip(MULTIPLICATIONS, run(tmp_path / "file.pte", list(parts), inputs), strict=True):
        assert torch.equal(arithmetic.dequantize(arithmetic.multiply(first, second, *grids), grids[-1]), found[0]), (
            grids
        )


def test_ties_of_a_multiplication_round_to_even() -> None:
    half, one = Grid(0.5, 0), Grid(1.0, 0)
    odd = torch.tensor([-3, -1, 1, 3], dtype=torch.int8)
    assert arithmetic.multiply(odd, torch.ones_like(odd), half, one, one).tolist() == [-2, 0, 0, 2]


def test_multiplications_out_of_range_are_refused() -> None:
    codes = torch.zeros(1, dtype=torch.int8)
    for ratio in (2.0**-17, 2.0**8):
        with pytest.raises(ValueError, match="outside"):
            arithmetic.multiply(codes, codes, Grid(ratio, 0), Grid(1.0, 0), Grid(1.0, 0))


class Float(nn.Module):
    def __init__(self, operator: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.operator = operator

    def forward(self, x: Tensor) -> Tensor:
        return self.operator(x)


class Scorer(nn.Module):
    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 1, 5, generator=generator), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.weight, padding=2)


def test_float_kernels_and_borders(tmp_path: Path) -> None:
    """quantize -> dequantize, means, the scorer's convolution and Hardswish in float: bit for bit."""
    generator = torch.Generator().manual_seed(2)
    grid, scorer = Grid(0.007844907231628895, 1), Scorer(generator)
    dense = torch.linspace(-1.2, 1.2, 32 * 32 * 8 - 284)
    ties = (torch.arange(-140, 140) + 0.5) * grid.scale
    border = torch.cat((dense, ties, torch.tensor([0.0, -0.0, 1e30, -1e30]))).reshape(8, 1, 32, 32)
    cases: list[tuple[nn.Module, Callable[[Tensor], Tensor], Tensor]] = [
        (
            Float(lambda x: through(x, grid)),
            lambda x: arithmetic.dequantize(arithmetic.quantize(x, grid), grid),
            border,
        ),
        (scorer, lambda x: float_kernels.conv1d(x, scorer.weight, 2), torch.randn(8, 1, 96, generator=generator)),
        (Float(F.hardswish), float_kernels.hardswish, torch.randn(8, 40, 6, 6, generator=generator) * 3),
    ]
    for shape in [(40, 4, 4), (130, 2, 2), (16, 5, 7)]:
        mean = Float(lambda x: x.mean((-1, -2), keepdim=True))
        cases.append((mean, float_kernels.mean_hw, torch.randn(8, *shape, generator=generator)))
    results = run(tmp_path / "file.pte", [case[0] for case in cases], [case[2] for case in cases])
    for index, ((_, kernel, x), found) in enumerate(zip(cases, results, strict=True)):
        assert torch.equal(kernel(x).flatten(1), found), index


class Mean(nn.Module):
    """quantize -> mean over H and W -> quantize."""

    def __init__(self, source: Grid, out: Grid) -> None:
        super().__init__()
        self.source, self.out = source, out

    def forward(self, x: Tensor) -> Tensor:
        return through(through(x, self.source).mean((-1, -2), keepdim=True), self.out)

    def wanted(self, x: Tensor) -> Tensor:
        mean = arithmetic.mean_hw(arithmetic.quantize(x, self.source), self.source, self.out)
        return arithmetic.dequantize(mean, self.out)


MEANS = [
    ((12, 7, 7), Grid(0.0371, -119), Grid(0.0072, -121)),
    ((70, 2, 2), Grid(0.05, 3), Grid(0.05, 3)),  # a quarter of the results are ties
    ((17, 3, 8), Grid(0.02, 90), Grid(0.0043, 11)),
    ((3, 20, 20), Grid(0.1, -128), Grid(0.012, -128)),
    ((33, 1, 1), Grid(0.03, -5), Grid(0.02, 7)),
]


def test_means(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    means = [Mean(source, out) for _, source, out in MEANS]
    inputs = [torch.randn((32, *shape), generator=generator) * source.scale * 60 for shape, source, _ in MEANS]
    for case, mean, x, found in zip(MEANS, means, inputs, run(tmp_path / "file.pte", means, inputs), strict=True):
        wanted = mean.wanted(x).flatten(1)
        assert torch.equal(wanted, found), case
        assert len(wanted.unique()) > 30, f"{case}: too few codes to tell"


def test_exact_dtype_holds_what_it_says() -> None:
    """Right below the bound every integer is a float32; right above it, 2^24 + 1 is not."""
    inside = torch.full((1, 518), 127, dtype=torch.int8)
    assert arithmetic.LARGEST_OFFSET * 127 * 518 < 2**24 < arithmetic.LARGEST_OFFSET * 127 * 519
    assert arithmetic.exact_dtype(inside) == torch.float32
    assert arithmetic.exact_dtype(torch.full((1, 519), 127, dtype=torch.int8)) == torch.float64


def test_fixed_point_factors_have_their_bits() -> None:
    for scales in [(0.05, 0.07, 0.09), (1.0, 1.0, 1.0), (2.0**-9, 2.0**-9, 1.0), (200.0, 1.0, 1.0)]:
        factors, shift = arithmetic.fixed_point(*scales)
        assert 2**20 <= max(factors) <= 2**21
        assert 12 <= shift <= 30


def random_codes(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)


def test_layers_sum_like_python_integers() -> None:
    """Against a definition in integers of any size, saturation and padding included."""
    codes, weight = random_codes((2, 3, 4, 4), 0), random_codes((2, 3, 3, 3), 1).clamp(-127)
    bias, zero_point = torch.tensor([1000, -2000], dtype=torch.int32), 11
    found = arithmetic.conv2d(codes, weight, bias, zero_point, torch.full((2,), 2.0**-7), -3, Taps((1, 1), (1, 1)))
    padded = F.pad(codes.long() - zero_point, (1, 1, 1, 1))
    for index in [(0, 0, 0, 0), (1, 1, 2, 3), (0, 1, 3, 3), (1, 0, 1, 1)]:
        b, c, y, x = index
        acc = int(bias[c]) + int((padded[b, :, y : y + 3, x : x + 3] * weight[c].long()).sum())
        assert int(found[index]) == max(-128, min(127, round(acc / 128) - 3))


def test_results_do_not_depend_on_the_batch() -> None:
    codes, weight = random_codes((32, 8, 6, 6), 2), random_codes((8, 8, 3, 3), 3).clamp(-127)
    args: tuple[Any, ...] = (weight, None, 5, torch.full((8,), 0.003), 0, Taps())
    whole = arithmetic.conv2d(codes, *args)
    assert torch.equal(torch.cat([arithmetic.conv2d(one, *args) for one in codes.split(1)]), whole)
