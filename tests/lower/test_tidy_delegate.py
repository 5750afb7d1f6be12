"""Tidying changes no bit of an answer, and finds what it is there to find."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as schema
from torch import Tensor, nn

from hadaptive_q.lower import executorch as lowering
from hadaptive_q.lower.delegate import INVALID, Delegate
from hadaptive_q.lower.runtime import PteFile
from hadaptive_q.lower.tidy_delegate import (
    cancel_transposes,
    drop_idle_reshapes,
    merge_repeated,
    narrow_early,
    share_bias_scales,
    tidy_delegate,
)
from hadaptive_q.quant.program import QuantizedProgram

TO_NHWC, TO_NCHW = [0, 2, 3, 1], [0, 3, 1, 2]
NCHW, NHWC = [1, 3, 4, 5], [1, 4, 5, 3]


def tensor(place: int, dims: list[int], external: bool = False, scale: float | None = None) -> schema.XValue:
    kind = schema.XNNDatatype.xnn_datatype_qint8 if scale else schema.XNNDatatype.xnn_datatype_fp32
    external_id, flags = (place, 1) if external else (INVALID, 0)
    plain = schema.XNNTensorValue(kind, len(dims), dims, 0, external_id, flags, place)
    return schema.XValue(schema.XNNQuantizedTensorValue(plain, schema.PerTensorQuant(scale, 0)) if scale else plain)


def transpose(source: int, output: int, perm: list[int]) -> schema.XNNStaticTranspose:
    return schema.XNNStaticTranspose(len(perm), perm, source, output, 0)


def reshape(source: int, output: int, shape: list[int]) -> schema.XNNStaticReshape:
    return schema.XNNStaticReshape(len(shape), shape, source, output, 0)


def graph_of(nodes: list[object], values: list[schema.XValue]) -> Delegate:
    constants = [schema.ConstantDataOffset(0, 0)]
    return Delegate(schema.XNNGraph("0", [schema.XNode(n, 0) for n in nodes], values, 2, [0], [9], constants), {})


def test_transposes_that_undo_each_other_go() -> None:
    delegate = graph_of(
        [transpose(0, 1, TO_NHWC), transpose(1, 2, TO_NCHW), schema.XNNAbs(2, 9, 0)],
        [tensor(0, NCHW, external=True), tensor(1, NHWC), tensor(2, NCHW), tensor(9, NCHW, external=True)],
    )
    assert cancel_transposes(delegate) > 0
    assert [(node.kind, node.inputs) for node in delegate.nodes] == [("XNNAbs", [0])]
    assert sorted(delegate.values) == [0, 9]


def test_an_output_of_the_delegate_is_still_made() -> None:
    delegate = graph_of(
        [transpose(0, 1, TO_NHWC), transpose(1, 9, TO_NCHW)],
        [tensor(0, NCHW, external=True), tensor(1, NHWC), tensor(9, NCHW, external=True)],
    )
    tidy_delegate(delegate)
    assert delegate.nodes[-1].outputs == [9]


def test_two_transposes_in_a_row_become_one() -> None:
    """The composed order, held against torch's own permutation."""
    first, second = [0, 2, 3, 1], [0, 2, 1, 3]
    x = torch.arange(60).reshape(NCHW)
    between, after = x.permute(first), x.permute(first).permute(second)
    delegate = graph_of(
        [transpose(0, 1, first), transpose(1, 9, second), schema.XNNAbs(1, 8, 0)],
        [
            tensor(0, NCHW, external=True),
            tensor(1, list(between.shape)),
            tensor(8, list(between.shape), external=True),
            tensor(9, list(after.shape), external=True),
        ],
    )
    assert cancel_transposes(delegate) == 1
    (composed,) = (node for node in delegate.nodes if node.outputs == [9])
    assert composed.inputs == [0]
    assert torch.equal(x.permute(composed.fields.perm), after)
    assert len(delegate.nodes) == 3, "the inner one has another reader"


def test_a_step_done_twice_is_done_once_and_another_scale_is_another_step() -> None:
    delegate = graph_of(
        [schema.XNNConvert(0, i, 0) for i in (1, 2, 3)] + [schema.XNNAdd(1, 2, 9, 0)],
        [
            tensor(0, NCHW, external=True),
            tensor(1, NCHW, scale=0.5),
            tensor(2, NCHW, scale=0.5),
            tensor(3, NCHW, scale=0.25),
            tensor(9, NCHW, external=True),
        ],
    )
    assert merge_repeated(delegate) == 1
    assert delegate.nodes[-1].inputs == [1, 1]
    assert [node.output for node in delegate.nodes] == [1, 3, 9]


def test_a_transpose_between_quantizing_and_its_undoing_goes() -> None:
    delegate = graph_of(
        [transpose(0, 1, TO_NCHW), schema.XNNConvert(1, 2, 0), transpose(2, 3, TO_NHWC), schema.XNNAbs(3, 9, 0)],
        [
            tensor(0, NHWC, external=True),
            tensor(1, NCHW),
            tensor(2, NCHW, scale=0.5),
            tensor(3, NHWC, scale=0.5),
            tensor(9, NHWC, external=True),
        ],
    )
    tidy_delegate(delegate)
    assert [(node.kind, node.inputs) for node in delegate.nodes] == [("XNNConvert", [0]), ("XNNAbs", [1])]
    assert (delegate.values[1].datatype, delegate.values[1].dims) == ("qint8", NHWC)


def test_a_transpose_that_has_another_reader_stays_in_float() -> None:
    delegate = graph_of(
        [transpose(0, 1, TO_NCHW), schema.XNNConvert(1, 8, 0), schema.XNNAbs(1, 9, 0)],
        [tensor(0, NHWC, external=True), tensor(1, NCHW), tensor(8, NCHW, scale=0.5), tensor(9, NCHW, external=True)],
    )
    assert narrow_early(delegate) == 0


def test_reshapes_of_reshapes_and_to_the_same_shape_go() -> None:
    delegate = graph_of(
        # The second keeps the first size of its input, which is 1 there.
        [reshape(0, 1, [1, 60]), reshape(1, 2, [0, 12, 5]), reshape(2, 3, [1, 12, 5]), schema.XNNAbs(3, 9, 0)],
        [
            tensor(0, [3, 4, 5], external=True),
            tensor(1, [1, 60]),
            tensor(2, [1, 12, 5]),
            tensor(3, [1, 12, 5]),
            tensor(9, [1, 12, 5], external=True),
        ],
    )
    while drop_idle_reshapes(delegate):
        pass
    assert [(node.kind, node.inputs) for node in delegate.nodes] == [("XNNStaticReshape", [0]), ("XNNAbs", [2])]
    assert delegate.nodes[0].fields.new_shape == [1, 12, 5]


def test_biases_take_their_weights_scales() -> None:
    quantized = schema.XNNDatatype.xnn_datatype_qcint8

    def weight(place: int, index: int, count: int) -> schema.XValue:
        plain = schema.XNNTensorValue(quantized, 1, [count], 0, INVALID, 0, place)
        return schema.XValue(schema.XNNQuantizedTensorValue(plain, schema.PerChannelQuant([], 0, index, count)))

    layer = schema.XNNFullyConnected(input1_id=0, filter_id=1, bias_id=2, output_id=9, flags=0)
    values = [tensor(0, NCHW, external=True), weight(1, 3, 4), weight(2, 5, 4), tensor(9, NCHW, external=True)]
    delegate = graph_of([layer], values)
    assert share_bias_scales(delegate) == 1
    assert delegate.values[2].quantization.scale_buffer_idx == 3
    assert share_bias_scales(delegate) == 0


@pytest.mark.parametrize("selection", ["rank", "channel", "static"])
def test_tidied_files_answer_bit_for_bit(
    make_program: Callable[[str], QuantizedProgram],
    make_file: Callable[[str], lowering.Lowered],
    inputs: Tensor,
    selection: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tidied = make_file(selection)
    monkeypatch.setattr(lowering, "tidy_delegate", lambda delegate: None)
    plain = lowering.lower(make_program(selection).export())

    answers = []
    for name, lowered in (("tidied", tidied), ("plain", plain)):
        (tmp_path / f"{name}.pte").write_bytes(lowered.data)
        file = PteFile(tmp_path / f"{name}.pte")
        answers.append(torch.cat([file(image[None]) for image in inputs[:12]]))
    assert torch.equal(*answers)
    assert answers[0].std() > 0

    assert len(tidied.data) < len(plain.data)
    # What computes, computes as before; only what moves data became less.
    assert Counter(tidied.coverage.int8_ops) == Counter(plain.coverage.int8_ops)
    assert tidied.coverage.transposes <= plain.coverage.transposes
    if selection != "static":
        assert tidied.coverage.transposes < plain.coverage.transposes
        assert tidied.coverage.conversions < plain.coverage.conversions


def test_float_files_are_tidied_alike(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return (y.permute(0, 2, 3, 1) * 2).permute(0, 3, 1, 2) + y.permute(0, 2, 3, 1).permute(0, 3, 1, 2).abs()

    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(1, 3, 4, 4)
    lowered = lowering.lower(torch.export.export(model, (x,)))
    (tmp_path / "f.pte").write_bytes(lowered.data)
    torch.testing.assert_close(PteFile(tmp_path / "f.pte")(x), model(x), rtol=1e-5, atol=1e-6)
