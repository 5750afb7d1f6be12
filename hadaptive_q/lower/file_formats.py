"""The files a quantized program can be written to. Another format is a file beside this one and an entry in FORMATS.

Free of torch, so that a wrong name is answered at once: a format's library is imported when it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from hadaptive_q.errors import UserError, nearest, require

if TYPE_CHECKING:
    from torch import Tensor

    from hadaptive_q.data.datasets import Split
    from hadaptive_q.lower.file_input import FileInput
    from hadaptive_q.models.config import Preprocess
    from hadaptive_q.quant.program import QuantizedProgram


class ModelFile(Protocol):
    """A written file in its own runtime: an image, as `input` says -> logits `(1, classes)`."""

    @property
    def input(self) -> FileInput: ...

    def __call__(self, inputs: Tensor) -> Tensor: ...

    def predict(self, split: Split, preprocess: Preprocess) -> Tensor: ...


@dataclass(frozen=True)
class FileFormat:
    """How a program becomes the bytes of a file, how the file is opened, and what both import beyond the basics."""

    lower: Callable[[QuantizedProgram], bytes]
    open: Callable[[Path], ModelFile]
    packages: tuple[str, ...] = ()


def _lower_pte(program: QuantizedProgram) -> bytes:
    from hadaptive_q.lower.executorch import lower

    return lower(program.export()).data


def _open_pte(path: Path) -> ModelFile:
    from hadaptive_q.lower.runtime import PteFile

    return PteFile(path)


def _lower_onnx(program: QuantizedProgram) -> bytes:
    from hadaptive_q.lower.onnx import to_onnx

    return to_onnx(program)


def _open_onnx(path: Path) -> ModelFile:
    from hadaptive_q.lower.onnx import OnnxFile

    return OnnxFile(path)


# By the suffix of the file.
FORMATS = {
    "pte": FileFormat(_lower_pte, _open_pte),
    "onnx": FileFormat(_lower_onnx, _open_onnx, ("onnx", "onnxscript", "onnxruntime")),
}


def find_formats(names: Sequence[str]) -> dict[str, FileFormat]:
    """Return the formats `names`. Raises UserError for one that is unknown, or whose packages are not installed."""
    for name in names:
        if name not in FORMATS:
            raise UserError(f"--to {name}", "an unknown format", f"one of {', '.join(FORMATS)}", nearest(name, FORMATS))
        require(f"format {name}", name, FORMATS[name].packages)
    return {name: FORMATS[name] for name in names}


def open_file(path: Path) -> ModelFile:
    """Open `path` by its suffix. Raises UserError where its runtime is not installed or refuses it."""
    (format_,) = find_formats([path.suffix.removeprefix(".")]).values()
    return format_.open(path)
