"""Files of any origin in the runtime: what takes one tensor of floats or bytes runs, anything else is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from hadaptive_q.data.datasets import ImageData
from hadaptive_q.errors import UserError
from hadaptive_q.lower.runtime import PteFile

IMAGE = torch.ones(1, 3, 4, 4)


def plain(path: Path, function: Callable[..., object], *example: object) -> Path:
    """Write a file that nobody optimised, with whatever inputs and outputs."""
    from executorch.exir import to_edge

    class Net(nn.Module):
        def forward(self, *inputs: object) -> object:
            return function(*inputs)

    path.write_bytes(to_edge(torch.export.export(Net(), example)).to_executorch().buffer)
    return path


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((IMAGE, IMAGE), r"got 2 inputs \(float32, float32\)"),
        ((IMAGE, 3), r"got 2 inputs \(float32, no tensor\)"),
        ((IMAGE.long(),), r"got an input \(int64\)"),
        ((IMAGE.half(),), r"got an input \(float16\)"),
        ((), "got no input"),
    ],
    ids=["two", "a number", "int64", "half", "none"],
)
def test_other_inputs_are_refused_in_a_line(tmp_path: Path, example: tuple[object, ...], message: str) -> None:
    path = plain(tmp_path / "other.pte", lambda *inputs: inputs[0] * 2 if inputs else torch.ones(3) * 2, *example)
    with pytest.raises(UserError, match=rf"other\.pte: {message}; expected a file with one input") as caught:
        PteFile(path)
    assert "\n" not in str(caught.value)


def test_bytes(tmp_path: Path) -> None:
    file = PteFile(plain(tmp_path / "bytes.pte", lambda x: x.float().mean((-1, -2)), IMAGE.to(torch.uint8)))
    example = file.example()
    assert example.dtype == torch.uint8
    torch.testing.assert_close(file(example), example.float().mean((-1, -2)))


def test_the_first_of_several_outputs_is_no_logits(tmp_path: Path, few_digits: ImageData) -> None:
    file = PteFile(plain(tmp_path / "two.pte", lambda x: (x + 1, x * 2), IMAGE))
    assert torch.equal(file(IMAGE), IMAGE + 1)
    with pytest.raises(UserError, match="got 2 outputs; expected a file that answers with logits alone"):
        file.predict(few_digits.val, few_digits.preprocess)
