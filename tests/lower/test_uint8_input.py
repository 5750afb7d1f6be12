"""A file of bytes is one delegate, says that it takes bytes, and answers as the integer interpreter does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hadaptive_q.data.datasets import ImageData
from hadaptive_q.data.transforms import normalise
from hadaptive_q.errors import UserError
from hadaptive_q.lower.executorch import Lowered
from hadaptive_q.lower.file_input import FileInput
from hadaptive_q.lower.runtime import PteFile
from hadaptive_q.lower.uint8_input import Uint8DequantizeConfig
from hadaptive_q.models.config import InputName
from hadaptive_q.quant.interpreter import IntegerProgram
from hadaptive_q.quant.program import QuantizedProgram

Q = torch.ops.quantized_decomposed


@pytest.mark.parametrize(("name", "shape"), [("uint8", (1, 32, 32, 3)), ("uint8_nchw", (1, 3, 32, 32))])
def test_the_file_computes_the_programs_integers(
    name: InputName,
    shape: tuple[int, ...],
    make_byte_program: Callable[..., QuantizedProgram],
    make_byte_file: Callable[..., Lowered],
    digits: ImageData,
    tmp_path: Path,
) -> None:
    program, lowered = make_byte_program(name), make_byte_file(name)
    assert lowered.coverage.delegates == 1
    assert lowered.coverage.portable_ops == ()
    (tmp_path / "model.pte").write_bytes(lowered.data)
    file = PteFile(tmp_path / "model.pte")
    assert file.input == FileInput("uint8", shape)
    example = file.example()
    assert (example.dtype, tuple(example.shape)) == (torch.uint8, shape)
    assert example.max() > 200

    images = torch.stack([digits.val[4 * i][0] for i in range(60)])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (60, *images.shape[1:]), dtype=torch.uint8, generator=generator)
    ramp = (torch.arange(3 * 32 * 32).reshape(1, 3, 32, 32) % 256).to(torch.uint8)
    images = torch.cat((images, noise, ramp, torch.zeros_like(ramp), torch.full_like(ramp, 255)))
    wanted = IntegerProgram(program)(normalise(images, program.preprocess))
    found = torch.cat([file(file.input.of(image[None], program.preprocess)) for image in images])
    assert torch.equal(found, wanted)
    assert len(wanted.unique()) > 100

    with pytest.raises(UserError, match=f"an input uint8 \\({shape[0]}, {shape[1]}"):
        file(torch.zeros(shape))


class Read(nn.Module):
    """Bytes that a quantize operator reads, or a float operator, too."""

    def __init__(self, in_float: bool) -> None:
        super().__init__()
        self.in_float = in_float

    def forward(self, x: Tensor) -> Tensor:
        pixels = Q.dequantize_per_tensor.default(x, 0.5, 0, 0, 255, torch.uint8)
        codes = Q.quantize_per_tensor.default(pixels, 0.5, -128, -128, 127, torch.int8)
        return codes + nn.functional.hardswish(pixels) if self.in_float else codes


@pytest.mark.parametrize("in_float", [False, True])
def test_only_bytes_that_become_codes_are_taken(in_float: bool) -> None:
    exported = torch.export.export(Read(in_float), (torch.zeros(1, 8, dtype=torch.uint8),))
    (read,) = (n for n in exported.graph.nodes if n.target == Q.dequantize_per_tensor.default)
    assert Uint8DequantizeConfig().check_constraints(read, exported) is not in_float
