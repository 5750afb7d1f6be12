"""`bench` measures any `.pte`: latency here, instructions on emulated cores, ratios between files."""

from __future__ import annotations

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
    assert all(result["wanted_arm_features"] == [] for result in results)


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
    assert small["missing_features"] == []


def test_refused_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "cut.pte").write_bytes(b"PTE?")
    with pytest.raises(UserError, match=r"cut\.pte"):
        bench_files([tmp_path / "cut.pte"], [])


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
