"""Run a `.pte` in the ExecuTorch runtime on this machine."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hadaptive_q.data.datasets import Split
from hadaptive_q.errors import UserError
from hadaptive_q.lower.file_input import FileInput
from hadaptive_q.models.config import Preprocess

# By the runtime's numbers of types, which are torch's.
_TYPES = {0: "uint8", 1: "int8", 3: "int32", 4: "int64", 5: "float16", 6: "float32", 7: "float64", 11: "bool"}
_TAKEN = ("uint8", "float32")


class PteFile:
    """A loaded `.pte` that takes one tensor of floats or bytes, as `input` says: an image -> logits `(1, classes)`.

    Raises UserError where the runtime refuses the file, and for one with other inputs.
    """

    def __init__(self, path: Path) -> None:
        # Imported here: the runtime is a native library, wanted only by those who run a file.
        from executorch.runtime import Runtime, Verification

        self.path = path
        if not path.is_file():
            raise UserError(f"file {path}", "no such file", "a .pte")
        try:
            with native_log() as log:
                program = Runtime.get().load_program(path, verification=Verification.InternalConsistency)
                method: Any = program.load_method("forward")
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"file {path}", f"'{log[-1] if log else error}'", "a .pte that the ExecuTorch runtime loads"
            ) from error
        if method is None:
            raise UserError(f"file {path}", "no method 'forward'", "a .pte written for inference")
        self._program, self._method = program, method
        found = self._inputs()
        if found not in [[name] for name in _TAKEN]:
            count = {0: "no input", 1: "an input"}.get(len(found), f"{len(found)} inputs")
            raise UserError(
                f"file {path}",
                f"{count} ({', '.join(found)})" if found else count,
                f"a file with one input, a tensor of {' or '.join(_TAKEN)}",
            )

    def _inputs(self) -> list[str]:
        """Return the types of all inputs."""
        meta, found = self._method.metadata, []
        for index in range(meta.num_inputs()):
            try:
                with native_log():
                    kind = int(meta.input_tensor_meta(index).dtype())
            except IndexError:  # how the runtime says that it is a number or a text
                found.append("no tensor")
            else:
                found.append(_TYPES.get(kind, f"type {kind}"))
        return found

    @property
    def input(self) -> FileInput:
        """The type and the sizes of the input the file was written for."""
        meta = self._method.metadata.input_tensor_meta(0)
        return FileInput(_TYPES[int(meta.dtype())], tuple(meta.sizes()))

    def example(self) -> Tensor:
        """Return an input of the right shape and type, pseudo-random and always the same."""
        values = torch.rand(self.input.shape, generator=torch.Generator().manual_seed(0))
        return (values * 255).to(torch.uint8) if self.input.dtype == "uint8" else values * 2 - 1

    def __call__(self, inputs: Tensor) -> Tensor:
        """Run an input of the file's type and shape; its first output is a copy that later calls leave alone."""
        try:
            out = self._method.execute([inputs.contiguous(memory_format=torch.contiguous_format)])[0]
        except RuntimeError as error:
            raise UserError(f"file {self.path}", f"'{error}'", f"an input {self.input}") from error
        result: Tensor = out.clone()
        return result

    def predict(self, split: Split, preprocess: Preprocess) -> Tensor:
        """Return logits `(N, classes)` over a whole split, one image at a time, as a phone would.

        Raises UserError for a file with other outputs than logits.
        """
        outputs = self._method.metadata.num_outputs()
        if outputs != 1:
            raise UserError(f"file {self.path}", f"{outputs} outputs", "a file that answers with logits alone")
        return torch.cat([self(self.input.of(split[i][0][None], preprocess)) for i in range(len(split))])


@contextmanager
def native_log() -> Iterator[list[str]]:
    """Collect what native code prints on standard error for a while: it is no message to the user.

    The runtime writes to the file descriptor and, through its Python binding, to `sys.stderr`: both are taken.
    """
    lines: list[str] = []
    sys.stderr.flush()
    with tempfile.TemporaryFile() as log:
        saved = os.dup(2)
        os.dup2(log.fileno(), 2)
        bound = io.StringIO()
        try:
            with contextlib.redirect_stderr(bound):
                yield lines
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            log.seek(0)
            lines += log.read().decode(errors="replace").splitlines() + bound.getvalue().splitlines()
