"""An NHWC image is convolved as it lies in memory, with the very sums of its patches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import GraphModule

from hadaptive_q.data.datasets import ImageData
from hadaptive_q.lower.executorch import Lowered
from hadaptive_q.quant.byte_rows import convolve_rows
from hadaptive_q.quant.program import QuantizedProgram
from hadaptive_q.rewrite.graph import aten, calls, constant, conv_settings


def first_convolution(graph: GraphModule) -> torch.fx.Node:
    return next(iter(calls(graph, aten.conv2d.default)))


def test_rows_are_convolved_with_the_same_integers(
    make_byte_program: Callable[..., QuantizedProgram], digits: ImageData
) -> None:
    program = make_byte_program("uint8")
    patched, by_rows = first_convolution(program.graph), first_convolution(program.shipped_graph())
    k = conv_settings(by_rows).stride[0]
    assert conv_settings(by_rows).stride == [k, 1]
    assert k > 1
    codes = [constant(graph, conv.args[1].args[0]) for graph, conv in ((program.graph, patched),)]  # type: ignore[union-attr]
    shipped = program.shipped_graph()
    rows = constant(shipped, first_convolution(shipped).args[1].args[0])  # type: ignore[union-attr]
    (patches,) = codes
    assert patches is not None
    assert rows is not None
    assert rows.shape == (len(patches), 3 * k, k, 1)

    image = torch.stack([digits.val[i][0] for i in range(4)]).double() - 128
    cells = torch.nn.functional.unfold(image, k, stride=k)  # (B, 3 k k, patches) in the order (c, dy, dx)
    wanted = torch.einsum("op,bpn->bon", patches.flatten(1).double(), cells)
    lying = image.permute(0, 2, 3, 1).reshape(len(image), 32, 32 // k, 3 * k).permute(0, 3, 1, 2)
    found = torch.nn.functional.conv2d(lying, rows.double(), stride=(k, 1)).flatten(2)
    assert torch.equal(found, wanted)


def test_no_transpose_of_the_image_is_left(make_byte_file: Callable[..., Lowered]) -> None:
    lowered = {name: make_byte_file(name).coverage for name in ("uint8", "uint8_nchw")}
    assert lowered["uint8"].transposes < lowered["uint8_nchw"].transposes
    for coverage in lowered.values():
        assert (coverage.delegates, coverage.portable_ops) == (1, ())


def test_other_graphs_stay(make_byte_program: Callable[..., QuantizedProgram]) -> None:
    assert convolve_rows(make_byte_program("uint8_nchw").shipped_graph()) == 0
    assert convolve_rows(make_byte_program("uint8").shipped_graph()) == 0, "once is enough"
