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
    converted = _converted(model, batches, image_size, 8)
    example = (torch.zeros(1, 3, image_size, image_size),)
    with torch.no_grad():
        edge = to_edge_transform_and_lower(torch.export.export(converted, example), partitioner=[XnnpackPartitioner()])
    return converted, bytes(edge.to_executorch().buffer)


def stock_int4(model: nn.Module, batches: Iterable[Tensor], image_size: int) -> nn.Module:
    """Return the converted program of the same recipe with 4-bit weights.

    There is no file to it: depthwise convolutions raise when it is lowered, and 1x1 convolutions do not load.
    """
    return _converted(model, batches, image_size, 4)


def _converted(model: nn.Module, batches: Iterable[Tensor], image_size: int, weight_bits: int) -> nn.Module:
    top = 2 ** (weight_bits - 1) - 1
    lowest = -top if weight_bits == 8 else -top - 1
    config = get_symmetric_quantization_config(is_per_channel=True, weight_qmin=lowest, weight_qmax=top)
    batch = torch.export.Dim("batch", min=1, max=1024)
    with torch.no_grad():
        exported = torch.export.export(
            model.eval(), (torch.zeros(2, 3, image_size, image_size),), dynamic_shapes=({0: batch},)
        )
        prepared = prepare_pt2e(exported.module(), XNNPACKQuantizer().set_global(config))
        for inputs in batches:
            prepared(inputs)
        return convert_pt2e(prepared)  # type: ignore[no-any-return]


def stock_float(model: nn.Module, image_size: int) -> bytes:
    """Return the `.pte` of the float model as stock tools lower it."""
    with torch.no_grad():
        exported = torch.export.export(model.eval(), (torch.zeros(1, 3, image_size, image_size),))
    edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    return bytes(edge.to_executorch().buffer)
