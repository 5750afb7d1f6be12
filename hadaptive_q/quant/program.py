"""The quantized program: the narrow waist between quantization and everything that ships.

A graph of ATen operators with quantize/dequantize operators that carry frozen scales. Backends end here; lowering,
reports and gates start here and know no backend.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from hadaptive_q.models.config import InputName, Preprocess
from hadaptive_q.quant.byte_input import as_bytes, take_bytes
from hadaptive_q.quant.plan import Plan
from hadaptive_q.rewrite.clamp_codes import clamp_codes


@dataclass(frozen=True)
class QuantizedProgram:
    """A converted network: callable on float inputs `(B, 3, S, S)`, exportable for one batch size or any.

    `input` is what it takes where it is exported; where that is bytes, the floats are ``pixel / 255``.
    """

    graph: GraphModule
    plan: Plan
    preprocess: Preprocess
    input: InputName = "float32"

    def __call__(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            out: Tensor = self.graph(inputs)
        return out

    def export(self, batch: int | None = 1) -> ExportedProgram:
        """Return the program for a fixed batch size, or for any (None), from a contiguous example of its input."""
        return export_graph(self.shipped_graph(), self.preprocess.image_size, batch, self.input)

    def shipped_graph(self) -> GraphModule:
        """Return the graph that a file is made of: `graph`, or a copy that takes bytes or clamps codes."""
        return clamp_codes(self.graph if self.input == "float32" else take_bytes(self.graph, self.input))


def export_graph(
    graph: torch.nn.Module, image_size: int, batch: int | None = 1, input_: InputName = "float32"
) -> ExportedProgram:
    """Export `graph` for inputs `(batch, 3, S, S)`, or what else `input_` names; None leaves the batch dimension free.

    The strides of the example decide the layout the file expects: contiguous, whatever the images were.
    """
    # A free dimension needs an example above 1, which would be taken for a constant.
    example = torch.zeros(batch or 2, 3, image_size, image_size).contiguous(memory_format=torch.contiguous_format)
    if input_ != "float32":
        example = as_bytes(example, input_)
    free = None if batch else ({0: torch.export.Dim("batch")},)
    with torch.no_grad():
        return torch.export.export(graph, (example,), dynamic_shapes=free)
