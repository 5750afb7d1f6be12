"""4-bit weights want dot products where the runtime has nothing but numbers one by one without them."""

from __future__ import annotations

import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
    XNNPACKQuantizer,
    get_symmetric_quantization_config,
)
from executorch.exir import to_edge_transform_and_lower
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from hadaptive_q.arm.cores import CORES
from hadaptive_q.lower.cpu_features import wanted_arm_features


def stock(bits: int, dynamic: bool) -> bytes:
    """Return a linear layer as the stock tools quantize and write it."""
    top = 2 ** (bits - 1) - 1
    config = get_symmetric_quantization_config(
        is_per_channel=True, is_dynamic=dynamic, weight_qmin=-top - (bits == 4), weight_qmax=top
    )
    example = (torch.randn(1, 48),)
    prepared = prepare_pt2e(
        torch.export.export(nn.Linear(48, 8).eval(), example).module(), XNNPACKQuantizer().set_global(config)
    )
    prepared(*example)
    program = torch.export.export(convert_pt2e(prepared), example)
    return bytes(to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch().buffer)


@pytest.mark.parametrize(
    ("bits", "dynamic", "wanted"), [(4, False, ("asimddp",)), (8, False, ()), (4, True, ()), (8, True, ())]
)
def test_files_of_the_stock_tools(bits: int, dynamic: bool, wanted: tuple[str, ...]) -> None:
    assert wanted_arm_features(stock(bits, dynamic)) == wanted


def test_which_cores_have_dot_products() -> None:
    having = {name for name, core in CORES.items() if not core.lacks(["asimddp"])}
    assert having == {"cortex-a55", "cortex-a76", "neoverse-v1"}
