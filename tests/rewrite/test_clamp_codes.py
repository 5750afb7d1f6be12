from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from hadaptive_q.data.datasets import ImageData
from hadaptive_q.lower.parity import output_scale
from hadaptive_q.quant.backends import torchao_pt2e as backend
from hadaptive_q.quant.interpreter import IntegerProgram
from hadaptive_q.quant.plan import make_plan
from hadaptive_q.quant.program import QuantizedProgram
from hadaptive_q.recipe import QuantizeConfig
from hadaptive_q.rewrite.clamp_codes import clamp_codes
from hadaptive_q.rewrite.graph import aten, calls

Q = torch.ops.quantized_decomposed
INT8 = (-128, 127, torch.int8)


@pytest.fixture
def make(nano_graph: GraphModule, inputs: Tensor, few_digits: ImageData) -> QuantizedProgram:
    plan = make_plan(nano_graph, QuantizeConfig(activation_bits=4))
    # Ranges that clip: what lies beyond the codes must be clamped, not merely be small.
    return backend.convert(
        backend.calibrate(backend.prepare(nano_graph, plan, "minmax"), [inputs / 2]), few_digits.preprocess
    )


def test_int8_holds_what_four_bits_are_clamped_to(make: QuantizedProgram, inputs: Tensor) -> None:
    program, code = make, make.graph.code
    shipped = program.shipped_graph()
    assert shipped is not program.graph
    assert program.graph.code == code, "the program itself stays as it is"
    narrow = [q for q in calls(program.graph, Q.quantize_per_tensor.default) if q.args[3:5] == (-8, 7)]
    assert len(narrow) > 10
    before, after = (len(list(calls(graph, aten.clamp.default))) for graph in (program.graph, shipped))
    assert after - before == len(narrow)
    for node in calls(shipped, Q.quantize_per_tensor.default, Q.dequantize_per_tensor.default):
        assert node.args[3:] == INT8
    with torch.no_grad():
        assert torch.equal(shipped(inputs), program(inputs))


def test_the_integer_interpreter_clamps_the_same_codes(make: QuantizedProgram, inputs: Tensor) -> None:
    integers = IntegerProgram(make)
    narrow = {name for name in integers.names if make.plan.activations[name].bits == 4}
    codes = integers.codes(inputs, narrow)
    ends = torch.stack([torch.stack(value.aminmax()) for value in codes.values()])
    assert (int(ends.min()), int(ends.max())) == (-8, 7)
    # Roundings of other orders move single codes; a code that was not clamped would move the logits by many.
    distance = (integers(inputs) - make(inputs)) / output_scale(make.graph)
    assert float(distance.abs().median()) <= 1


def test_int8_needs_no_clamp(make_program: object) -> None:
    graph = make_program("rank").graph  # type: ignore[operator]
    assert clamp_codes(graph) is graph
