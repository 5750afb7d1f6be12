"""The stock tools' own INT8 recipe, for comparison: XNNPACKQuantizer, calibrated and lowered as documented.

Nothing of this project touches the model between float and file.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
    XNNPACKQuantizer,
    get_symmetric_quantization_config,
)
from executorch.exir import to_edge_transform_and_lower
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e


def stock_int8(model: nn.Module, batches: Iterable[Tensor], image_size: int) -> tuple[nn.Module, bytes]:
    """Return the converted program and the `.pte` of stock post-training INT8, per channel, static."""
    example = (torch.zeros(1, 3, image_size, image_size),)
    batch = torch.export.Dim("batch", min=1, max=1024)
    with torch.no_grad():
        exported = torch.export.export(
            model.eval(), (torch.zeros(2, 3, image_size, image_size),), dynamic_shapes=({0: batch},)
        )
        quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
        prepared = prepare_pt2e(exported.module(), quantizer)
        for inputs in batches:
            prepared(inputs)
        converted = convert_pt2e(prepared)
        edge = to_edge_transform_and_lower(torch.export.export(converted, example), partitioner=[XnnpackPartitioner()])
    return converted, bytes(edge.to_executorch().buffer)


def stock_float(model: nn.Module, image_size: int) -> bytes:
    """Return the `.pte` of the float model as stock tools lower it."""
    with torch.no_grad():
        exported = torch.export.export(model.eval(), (torch.zeros(1, 3, image_size, image_size),))
    edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    return bytes(edge.to_executorch().buffer)
