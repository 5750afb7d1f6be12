"""Counts repeat exactly and add up; outputs on ARM64 are those of this machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hadaptive_q.arm.cores import CORES
from hadaptive_q.arm.count import count_instructions, run_on
from hadaptive_q.errors import UserError

CLASSES = {"dot", "simd", "memory", "integer", "branch", "other"}


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("core", CORES)
def test_counts_repeat_and_add_up(
    core: str, float_file: tuple[Path, Tensor, Tensor], int8_file: tuple[Path, Tensor, Tensor]
) -> None:
    for file in (float_file, int8_file):
        counts = count_instructions(file[0], core)
        assert counts == count_instructions(file[0], core)
        assert set(counts.by_class) == CLASSES
        assert sum(counts.by_class.values()) == counts.total > 10_000
        has_dots = file is int8_file and core not in {"cortex-a53", "cortex-a72"}
        assert (counts.by_class["dot"] > 0) == has_dots


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("core", CORES)
def test_outputs_are_those_of_this_machine(
    core: str, float_file: tuple[Path, Tensor, Tensor], int8_file: tuple[Path, Tensor, Tensor]
) -> None:
    """Static int8 is exact on every core; float kernels sum in another order."""
    path, inputs, outputs = int8_file
    assert np.array_equal(run_on(path, core, inputs), outputs.numpy())
    path, inputs, outputs = float_file
    found = run_on(path, core, inputs)
    assert found.shape == (4, 10)
    assert np.abs(found - outputs.numpy()).max() < 1e-5


@pytest.mark.usefixtures("emulator")
def test_inputs_are_the_file_s_bytes(float_file: tuple[Path, Tensor, Tensor]) -> None:
    state, drawn = 1, []
    for _ in range(3 * 16 * 16):
        state = (1664525 * state + 1013904223) % 2**32
        drawn.append((state >> 8) / 2**23 - 1)
    given = count_instructions(float_file[0], "cortex-a76", np.array(drawn, dtype=np.float32).tobytes())
    # Nothing in this file depends on data, and the runner reads its inputs before it counts: only the heap differs.
    assert given.total == pytest.approx(count_instructions(float_file[0], "cortex-a76").total, rel=1e-3)
    with pytest.raises(UserError, match="8 bytes, not a multiple of the 3072 bytes"):
        count_instructions(float_file[0], "cortex-a76", bytes(8))


@pytest.mark.usefixtures("emulator")
def test_layout_and_precision_of_samples_do_not_matter(int8_file: tuple[Path, Tensor, Tensor]) -> None:
    path, inputs, outputs = int8_file
    strided = inputs.to(memory_format=torch.channels_last)
    assert np.array_equal(run_on(path, "cortex-a76", strided), outputs.numpy())
    assert np.array_equal(run_on(path, "cortex-a76", inputs.double().numpy()), outputs.numpy())


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros((4, 16, 16, 3), np.float32), r"float32 \(4, 16, 16, 3\); expected samples float32 \(N, 3, 16, 16\)"),
        (np.zeros((4, 3, 16, 16), np.uint8), r"uint8 \(4, 3, 16, 16\)"),
        (np.zeros((1, 3, 8, 8), np.float32), "768 bytes, not a multiple of the 3072 bytes"),
        (np.zeros((0, 3, 16, 16), np.float32), "0 bytes"),
    ],
    ids=["channels last", "bytes", "too small", "none"],
)
def test_wrong_samples_are_refused(int8_file: tuple[Path, Tensor, Tensor], samples: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_on(int8_file[0], "cortex-a76", samples)


@pytest.mark.usefixtures("emulator")
def test_files_with_bytes_and_with_two_inputs(tmp_path: Path) -> None:
    class Mean(nn.Module):
        def forward(self, image: Tensor, offset: Tensor) -> Tensor:
            return image.to(torch.float32).mean((-1, -2)) + offset

    from executorch.exir import to_edge

    image = torch.arange(48, dtype=torch.uint8).reshape(1, 3, 4, 4)
    path = tmp_path / "two.pte"
    program = torch.export.export(Mean(), (image, torch.ones(3)))
    path.write_bytes(to_edge(program).to_executorch().buffer)
    assert count_instructions(path, "cortex-a76").total > 100
    assert count_instructions(path, "cortex-a76", bytes(48 + 12)).total > 100
    with pytest.raises(UserError, match="multiple of the 60 bytes"):
        run_on(path, "cortex-a76", image)
    with pytest.raises(UserError, match=r"samples uint8 \(N, 3, 4, 4\) and float32"):
        run_on(path, "cortex-a76", np.zeros((1, 60), np.uint8))

    class Alone(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return image.to(torch.float32).mean((-1, -2))

    path.write_bytes(to_edge(torch.export.export(Alone(), (image,))).to_executorch().buffer)
    assert run_on(path, "cortex-a76", torch.cat([image, image + 1])).tolist() == [[7.5, 23.5, 39.5], [8.5, 24.5, 40.5]]


@pytest.mark.usefixtures("emulator")
def test_files_the_runtime_refuses(int8_file: tuple[Path, Tensor, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "garbage.pte"
    path.write_bytes(b"no flatbuffer" * 100)
    with pytest.raises(UserError, match="the runtime cannot load the file"):
        count_instructions(path, "cortex-a76")
    path.write_bytes(int8_file[0].read_bytes()[:3000])
    with pytest.raises(UserError, match=r"garbage\.pte on cortex-a53"):
        run_on(path, "cortex-a53", int8_file[1])


def test_mistakes_are_found_before_anything_is_built(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'cortex-a55'"):
        count_instructions(tmp_path / "model.pte", "cortex-a5")
    with pytest.raises(UserError, match="no such file"):
        count_instructions(tmp_path / "model.pte", "cortex-a55")


def test_missing_emulator_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "")
    (tmp_path / "model.pte").write_bytes(b"")
    with pytest.raises(UserError, match="apt-get install qemu-user"):
        count_instructions(tmp_path / "model.pte", "cortex-a55")
