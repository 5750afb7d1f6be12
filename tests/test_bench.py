"""`bench` measures any `.pte`: latency here, instructions on emulated cores, ratios between files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from hadaptive_q.arm.build import missing
from hadaptive_q.bench import bench_files, ratios
from hadaptive_q.errors import UserError
from hadaptive_q.lower.executorch import lower
from hadaptive_q.quant.program import export_graph


def write(path: Path, width: int) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, width, 3, 2), nn.Hardswish(), nn.Flatten(), nn.LazyLinear(4))
    model(torch.zeros(1, 3, 16, 16))
    path.write_bytes(lower(export_graph(model.eval(), 16)).data)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("bench")
    return [write(folder / "small.pte", 8), write(folder / "large.pte", 64)]


def test_latency_and_size_of_every_file(files: list[Path]) -> None:
    results = bench_files(files, [])
    assert [result["file"] for result in results] == [str(file) for file in files]
    assert [result["bytes"] for result in results] == [file.stat().st_size for file in files]
    assert all(result["host_ms_median"] > 0 and result["arm"] == {} for result in results)


@pytest.mark.skipif(bool(missing()), reason=missing() or "emulator present")
def test_instructions_and_operators(files: list[Path]) -> None:
    small, large = (result["arm"]["cortex-a76"] for result in bench_files(files, ["cortex-a76"], operators=True))
    assert small["instructions"] < large["instructions"]
    assert sum(large["by_class"].values()) == large["instructions"]
    assert any("Convolution" in name for name in large["operators"])
    # Tracing costs under a thousand instructions for each delegate.
    assert sum(large["operators"].values()) == pytest.approx(large["instructions"], abs=5000)
    (again,) = bench_files(files[1:], ["cortex-a76"])
    assert again["arm"]["cortex-a76"]["instructions"] == large["instructions"]


def test_refused_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "cut.pte").write_bytes(b"PTE?")
    with pytest.raises(UserError, match=r"cut\.pte"):
        bench_files([tmp_path / "cut.pte"], [])


def plain(path: Path, function: Callable[..., object], *example: object) -> Path:
    """Write a file that nobody optimised, with whatever inputs and outputs."""
    from executorch.exir import to_edge

    class Net(nn.Module):
        def forward(self, *inputs: object) -> object:
            return function(*inputs)

    path.write_bytes(to_edge(torch.export.export(Net(), example)).to_executorch().buffer)
    return path


IMAGE = torch.ones(1, 3, 4, 4)


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
        bench_files([path], [])
    assert "\n" not in str(caught.value)


def test_bytes_and_several_outputs(tmp_path: Path) -> None:
    pixels = plain(tmp_path / "bytes.pte", lambda x: x.float().mean((-1, -2)), IMAGE.to(torch.uint8))
    two = plain(tmp_path / "two.pte", lambda x: (x + 1, x * 2), IMAGE)
    assert all(result["host_ms_median"] > 0 for result in bench_files([pixels, two], []))


def test_missing_emulator_is_said_before_any_work(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("hadaptive_q.bench.latencies", lambda *_: pytest.fail("measured before the tools were there"))
    with pytest.raises(UserError, match="apt-get install qemu-user"):
        bench_files(files, ["cortex-a76"])


def test_operators_want_a_core(files: list[Path]) -> None:
    with pytest.raises(UserError, match="add --core"):
        bench_files(files, [], operators=True)


def test_ratios_are_to_the_compared_file() -> None:
    def result(size: int, milliseconds: float, count: int) -> dict[str, object]:
        return {"bytes": size, "host_ms_median": milliseconds, "arm": {"cortex-a76": {"instructions": count}}}

    found = ratios(result(10, 1.5, 300), result(40, 0.5, 100))
    assert found == {"bytes": 0.25, "host_ms_median": 3.0, "arm": {"cortex-a76": 3.0}}
