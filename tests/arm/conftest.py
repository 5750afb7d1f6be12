"""Two tiny files, float and static int8, their outputs on this machine, and the emulator where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hadaptive_q.arm.build import Build, missing, prepare
from hadaptive_q.errors import UserError

# A `.pte`, four inputs (4, 3, 16, 16) and the ExecuTorch runtime's outputs (4, 10) for them on this machine.
Sample = tuple[Path, Tensor, Tensor]


class Tiny(nn.Module):
    """A conv, a depthwise conv, two branches side by side and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(torch.cat([x, self.depthwise(x)], 1).mean((-1, -2)))


@pytest.fixture(scope="session")
def emulator() -> Build:
    """The build of this test run; the whole of emulated ARM64 is skipped where it cannot be had."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    try:
        return prepare()
    except UserError as error:
        if "pip" not in str(error):
            raise
        pytest.skip(str(error))


def _write(model: nn.Module, inputs: Tensor, path: Path) -> Sample:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    program = torch.export.export(model, (inputs[:1],))
    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    path.write_bytes(edge.to_executorch().buffer)
    method = Runtime.get().load_program(path).load_method("forward")
    assert method is not None
    outputs = [method.execute([inputs[i : i + 1].contiguous()])[0].clone() for i in range(len(inputs))]
    return path, inputs, torch.cat(outputs)


@pytest.fixture(scope="session")
def tiny() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Tiny().eval(), torch.rand(4, 3, 16, 16) * 2 - 1


@pytest.fixture(scope="session")
def float_file(tiny: tuple[nn.Module, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Sample:
    model, inputs = tiny
    return _write(model, inputs, tmp_path_factory.mktemp("arm") / "float.pte")


@pytest.fixture(scope="session")
def int8_file(tiny: tuple[nn.Module, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Sample:
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    model, inputs = tiny
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(torch.export.export(model, (inputs[:1],)).module(), quantizer)
    for image in inputs:
        prepared(image[None])
    return _write(convert_pt2e(prepared), inputs, tmp_path_factory.mktemp("arm") / "int8.pte")
