"""The command line under a launcher of two processes: one writes and speaks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hadaptive_q import processes
from hadaptive_q.report.record import Report


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes with eight small images each."""
    generator = np.random.default_rng(0)
    for index in range(16):
        folder = tmp_path / "images" / ("cats", "dogs")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return tmp_path / "images"


@pytest.mark.slow
def test_two_processes_make_one_run(images: Path, tmp_path: Path) -> None:
    settings = ["model=hadaptive_net_nano", "image_size=32", "float.epochs=1", "float.batch_size=4", "fit.epochs=1"]
    arguments = [part for setting in [*settings, "fit.batch_size=4"] for part in ("--set", setting)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "hadaptive_q", "qat", "--data", str(images), "--out", str(tmp_path / "run"), *arguments]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    done = subprocess.run(
        [*launcher, *command],
        env={**os.environ, "TMPDIR": str(scratch)},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    report = Report.model_validate_json((run / "report.json").read_text())
    assert (report.accuracy.samples, report.size.pte_bytes) == (4, (run / "model.pte").stat().st_size)
    assert not [path.name for path in run.iterdir() if path.name.startswith(".")], "locks and half-written files"
    assert not list(scratch.glob("*/float.state")), "the second process leaves nothing behind"
    assert done.stdout.count("model.pte") == 1, f"both speak: {done.stdout}"


def test_rows_fall_to_processes_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (processes.count(), processes.index(), processes.own_rows([1, 2, 3])) == (1, 0, [1, 2, 3])
    shares = []
    for rank in "01":
        for name, value in {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}.items():
            monkeypatch.setenv(name, value)
        shares.append(processes.own_rows([1, 2, 3, 4]))
    assert shares == [[1, 2], [3, 4]]
