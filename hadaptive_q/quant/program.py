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

from hadaptive_q.models.config import Preprocess
from hadaptive_q.quant.plan import Plan


@dataclass(frozen=True)
class QuantizedProgram:
    """A converted network: callable on float inputs `(B, 3, S, S)`, exportable for one batch size or any."""

    graph: GraphModule
    plan: Plan
    preprocess: Preprocess

    def __call__(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            out: Tensor = self.graph(inputs)
        return out

    def export(self, batch: int | None = 1) -> ExportedProgram:
        """Return the program for a fixed batch size, or for any (None), from an example in contiguous NCHW strides."""
        return export_graph(self.graph, self.preprocess.image_size, batch)


def export_graph(graph: torch.nn.Module, image_size: int, batch: int | None = 1) -> ExportedProgram:
    """Export `graph` for inputs `(batch, 3, S, S)`; None leaves the batch dimension free.

    The strides of the example decide the layout the file expects: contiguous, whatever the images were.
    """
    # A free dimension needs an example above 1, which would be taken for a constant.
    example = torch.zeros(batch or 2, 3, image_size, image_size).contiguous(memory_format=torch.contiguous_format)
    free = None if batch else ({0: torch.export.Dim("batch")},)
    with torch.no_grad():
        return torch.export.export(graph, (example,), dynamic_shapes=free)
