from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hadaptive_q.lower.parity import agreement, compare, output_scale, sqnr_db, top1, topk
from hadaptive_q.rewrite.graph import calls, finish, trace

SCALE = 0.125
CODES = torch.tensor([[10, -3, 0], [1, 2, 3], [-5, 7, 6], [0, 4, -4]])


def test_equal_outputs_are_equal_in_every_measure() -> None:
    parity = compare(CODES * SCALE, CODES * SCALE, SCALE)
    assert (parity.top1_agreement, parity.changed_fraction, parity.max_codes) == (1.0, 0.0, 0)
    assert parity.sqnr_db == math.inf


def test_differences_are_counted_in_codes() -> None:
    other = CODES.clone()
    other[0, 0] -= 1  # still the largest of its row
    other[1, 2] -= 3  # the row's first class moves from 2 to 1
    other[3, 1] += 2
    parity = compare(CODES * SCALE, other * SCALE, SCALE)
    assert parity.max_codes == 3
    assert parity.changed_fraction == pytest.approx(3 / 12)
    assert parity.top1_agreement == pytest.approx(3 / 4)
    signal, noise = float((CODES**2).sum()), 1 + 9 + 4
    assert parity.sqnr_db == pytest.approx(10 * math.log10(signal / noise))


@pytest.mark.parametrize(("part_of_a_code", "changed"), [(0.0, 0), (0.4, 0), (-0.4, 0), (0.6, 1), (-1.4, 1)])
def test_less_than_half_a_code_is_no_difference(part_of_a_code: float, changed: int) -> None:
    """What leaves a file in float is a code times a scale, up to float rounding."""
    other = CODES * SCALE
    other[2, 2] += part_of_a_code * SCALE
    parity = compare(CODES * SCALE, other, SCALE)
    assert parity.max_codes == changed
    assert parity.changed_fraction == pytest.approx(changed / 12)


@pytest.mark.parametrize("scale", [2**-12, 0.1, 37.5])
def test_codes_do_not_depend_on_the_size_of_the_scale(scale: float) -> None:
    reference = CODES.float() * scale
    other = (CODES + 1).float() * scale
    assert compare(reference, other, scale).max_codes == 1


def test_sqnr_of_known_signals() -> None:
    signal = torch.tensor([3.0, 4.0])
    assert sqnr_db(signal, signal * 0.9) == pytest.approx(20, abs=1e-4)
    assert sqnr_db(signal, signal * 0) == pytest.approx(0)
    assert sqnr_db(signal * 1e-20, signal * 0.99e-20) == pytest.approx(40, abs=1e-3), "squares underflow float32"
    assert sqnr_db(signal, signal) == math.inf
    assert sqnr_db(signal * 0, signal) == -math.inf
    assert sqnr_db(signal * 0, signal * 0) == math.inf


def test_accuracy_in_percent() -> None:
    labels = torch.tensor([0, 1, 2, 1])
    logits = CODES.float()
    assert top1(logits, labels) == pytest.approx(50)  # rows 0 and 3
    assert topk(logits, labels, 1) == top1(logits, labels)
    assert topk(logits, labels, 2) == pytest.approx(100)
    assert topk(logits, labels, 5) == 100, "three classes have no fifth"


def test_agreement_is_about_classes_and_not_values() -> None:
    assert agreement(CODES, CODES * 100 + 3) == 1
    assert agreement(CODES, -CODES) == 0.0
    assert agreement(CODES[:2], CODES[2:]) == 0.0


def quantized(signature: tuple[object, ...] = (0.25, 3, -128, 127, torch.int8)) -> torch.fx.GraphModule:
    import torchao.quantization.pt2e.quantize_pt2e  # noqa: F401 -- registers the operators

    graph = trace(nn.Flatten(), 8)
    (flat,) = calls(graph, torch.ops.aten.flatten.using_ints)
    ops = torch.ops.quantized_decomposed
    with graph.graph.inserting_after(flat):
        q = graph.graph.call_function(ops.quantize_per_tensor.default, (flat, *signature))
    with graph.graph.inserting_after(q):
        dq = graph.graph.call_function(ops.dequantize_per_tensor.default, (q, *signature))
    (output,) = (n for n in graph.graph.nodes if n.op == "output")
    output.replace_input_with(flat, dq)
    finish(graph)
    return graph


def test_the_scale_of_the_output_is_read_from_the_program() -> None:
    assert output_scale(quantized()) == 0.25


def test_a_float_output_has_no_scale() -> None:
    with pytest.raises(ValueError, match=r"the output comes from aten\.flatten.*, not from a dequantize"):
        output_scale(trace(nn.Flatten(), 8))
