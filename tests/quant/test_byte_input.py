"""The graph that takes bytes computes the very codes of the program that takes pixels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hadaptive_q.data.datasets import ImageData
from hadaptive_q.data.transforms import normalise
from hadaptive_q.lower.parity import output_scale
from hadaptive_q.models.config import InputName
from hadaptive_q.quant.byte_input import as_bytes, take_bytes
from hadaptive_q.quant.program import QuantizedProgram


@pytest.mark.parametrize("name", ["uint8", "uint8_nchw"])
def test_bytes_give_the_logits_of_pixels(
    name: InputName, make_byte_program: Callable[..., QuantizedProgram], digits: ImageData
) -> None:
    program = make_byte_program(name)
    code = program.graph.code
    images = torch.stack([digits.val[i][0] for i in range(40)])
    images[0], images[1] = 255, torch.arange(3 * 32 * 32).reshape(3, 32, 32) % 256
    wanted = program(normalise(images, program.preprocess))
    assert len(wanted.unique()) > 100

    fed = images.permute(0, 2, 3, 1).contiguous() if name == "uint8" else images
    assert torch.equal(as_bytes(normalise(images, program.preprocess), name), fed)
    with torch.no_grad():
        found = program.shipped_graph()(fed)
    # Rows are convolved in another order of float sums, which may move a code at a tie; the integers are the same.
    codes = (found - wanted).abs() / output_scale(program.graph)
    assert codes.max() < (1.5 if name == "uint8" else 0.5)
    assert (codes > 0.5).double().mean() < 0.01
    assert program.graph.code == code, "the program itself goes on taking pixels"


def test_a_program_planned_for_floats_is_refused(nano_run: object) -> None:
    program: QuantizedProgram = nano_run.program  # type: ignore[attr-defined]
    assert program.shipped_graph() is program.graph
    with pytest.raises(ValueError, match="quantizes the image with scale"):
        take_bytes(program.graph, "uint8")
