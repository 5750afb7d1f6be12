"""A comparison of nano networks: one that is trained, one from a finished run, and some that fail."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hadaptive_q import compare as comparing
from hadaptive_q.arm import build
from hadaptive_q.arm.count import count_instructions
from hadaptive_q.candidates import Candidates, find_candidates
from hadaptive_q.changes import float_drop
from hadaptive_q.compare import compare
from hadaptive_q.data.calibration import Manifest
from hadaptive_q.errors import UserError
from hadaptive_q.models.checkpoint import load_model, save_model
from hadaptive_q.models.families import create_model
from hadaptive_q.models.network import count_macs, count_parameters
from hadaptive_q.report.comparison import Comparison
from hadaptive_q.report.record import read_report

CORE = "cortex-a76"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def candidates(nano_run: Any, folder: Path) -> Candidates:
    """A network that learns for an epoch, a checkpoint of too few classes, and a finished run."""
    (folder / "few.yaml").write_text(Manifest(source="digits", count=32).to_yaml())
    manifest = json.dumps(str(folder / "few.yaml"))
    torch.manual_seed(0)
    save_model(create_model("hadaptive_net_nano", 2), folder / "of_two_classes.safetensors")
    models = ["mobilenet_v3_nano", str(folder / "of_two_classes.safetensors"), str(nano_run.folder)]
    settings = ["image_size=32", "float.epochs=1", f"calibration.manifest={manifest}"]
    return find_candidates(models, ["int8_ptq"], settings, "digits")


@pytest.fixture(scope="module")
def compared(candidates: Candidates, folder: Path) -> Comparison:
    return compare(candidates, folder / "out", CORE)


@pytest.fixture
def nothing_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "quantize", lambda *_: pytest.fail("nothing is to be made"))


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[list[Path]]:
    """Return the files of every timing, which takes no time and gives a millisecond each."""
    calls: list[list[Path]] = []

    def instead(files: list[Path], _cores: list[str]) -> list[dict[str, float]]:
        calls.append(files)
        return [{"bytes": file.stat().st_size, "host_ms_median": 1.0, "host_ms_spread": 0.0} for file in files]

    monkeypatch.setattr(comparing, "bench_files", instead)
    return calls


def only(candidates: Candidates, *names: str) -> Candidates:
    return Candidates(candidates.data, tuple(each for each in candidates.models if each.name in names))


def test_figures_are_those_of_the_files(compared: Comparison, folder: Path, nano_run: Any) -> None:
    assert [(each.name, each.model) for each in compared.models] == [
        ("mobilenet_v3_nano", "mobilenet_v3_nano"),
        ("run", "hadaptive_net_nano"),
    ]
    assert (folder / "out" / compared.models[1].run).resolve() == nano_run.folder.resolve()
    for each in compared.models:
        run = folder / "out" / each.run
        report, network = read_report(run), load_model(run / "float.safetensors")
        assert (each.accuracy, each.recipe_digest) == (report.accuracy, report.recipe_digest)
        assert each.float_agreement == report.parity.float_agreement
        drop = float_drop(report)
        assert (each.drop.points, each.drop.low, each.drop.high) == (drop.points, *drop.interval)
        assert each.drop.points == pytest.approx(report.accuracy.float_top1 - report.accuracy.pte_top1)
        assert each.drop.low <= each.drop.points <= each.drop.high
        assert each.pte_bytes == (run / "model.pte").stat().st_size
        assert each.float_pte_bytes == (run / "float.pte").stat().st_size
        assert (each.image_size, each.params, each.macs) == (32, count_parameters(network), count_macs(network, 32))
        assert (each.delegates, each.portable_ops) == (report.coverage.delegates, report.coverage.portable_ops)
        assert report.answers
        assert report.answers.split == compared.split


def test_latencies_are_ratios_to_the_first(compared: Comparison) -> None:
    first, second = compared.models
    assert first.latency_ratio == 1
    for each in (first, second):
        base = first.latency.host_ms_median
        assert each.latency_ratio == pytest.approx(each.latency.host_ms_median / base)
        assert each.float_latency_ratio == pytest.approx(each.latency.float_host_ms_median / base)


@pytest.mark.skipif(bool(build.missing()), reason=build.missing() or "emulator present")
def test_instructions_are_those_of_the_files(compared: Comparison, folder: Path) -> None:
    assert (compared.core, compared.instructions_absent) == (CORE, "")
    each = compared.models[0]
    assert each.instructions
    for name, count in (("model.pte", each.instructions.pte), ("float.pte", each.instructions.float_pte)):
        assert count == count_instructions(folder / "out" / each.run / name, CORE).total


def test_who_fails_is_named_and_the_others_go_on(compared: Comparison) -> None:
    (failure,) = compared.failed
    assert failure.name == "of_two_classes"
    assert failure.error == "--checkpoint: got 2 classes; expected 10, as --data digits has"


def test_everything_is_written(compared: Comparison, folder: Path) -> None:
    out = folder / "out"
    assert Comparison.model_validate_json((out / "compare.json").read_text()) == compared
    for name in ("compare.md", "compare.html"):
        assert "of_two_classes" in (out / name).read_text()
    left = {path.name for path in out.iterdir()}
    assert left == {"compare.json", "compare.md", "compare.html", "mobilenet_v3_nano", "of_two_classes"}


def test_finished_runs_are_not_repeated(
    compared: Comparison, candidates: Candidates, folder: Path, nothing_made: None, timed: list[list[Path]]
) -> None:
    before = (folder / "out" / "mobilenet_v3_nano" / "report.json").stat().st_mtime_ns
    again = compare(only(candidates, "mobilenet_v3_nano", "run"), folder / "out", CORE)
    free = {"latency", "latency_ratio", "float_latency_ratio"}
    assert [each.model_dump(exclude=free) for each in again.models] == [
        each.model_dump(exclude=free) for each in compared.models
    ]
    assert again.failed == []
    (files,) = timed
    assert [path.name for path in files] == ["model.pte", "float.pte"] * 2, "all in one go"
    assert (folder / "out" / "mobilenet_v3_nano" / "report.json").stat().st_mtime_ns == before


def test_another_recipe_is_run_anew(
    compared: Comparison,
    candidates: Candidates,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    timed: list[list[Path]],
) -> None:
    """And where lowering breaks, that is one model's failure, too."""
    asked: list[Path] = []

    def broken(_recipe: object, out: Path, _checkpoint: object) -> None:
        asked.append(out)
        raise RuntimeError("the lowered file answers nonsense\nwith details")

    monkeypatch.setattr(comparing, "quantize", broken)
    kept = only(candidates, "mobilenet_v3_nano", "run")
    trained = find_candidates(["mobilenet_v3_nano"], ["int8_ptq"], ["image_size=32", "seed=1"])
    other = Candidates("digits", (*trained.models, kept.models[1]))
    record = compare(other, folder / "out", CORE)
    assert asked == [folder / "out" / "mobilenet_v3_nano"]
    assert [each.name for each in record.models] == ["run"]
    assert [(each.name, each.error) for each in record.failed] == [
        ("mobilenet_v3_nano", "the lowered file answers nonsense")
    ]
    assert record.models[0].latency_ratio == 1, "the first that is left"


def test_nothing_but_failures_is_an_error(candidates: Candidates, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing but failures, such as of_two_classes: '--checkpoint: got 2 classes"):
        compare(only(candidates, "of_two_classes"), tmp_path, CORE)
    assert not list(tmp_path.glob("compare.*"))


@pytest.mark.parametrize("answers", [None, {"split": "sha256:of other images"}])
def test_a_run_on_other_data_is_refused_before_any_work(
    answers: dict[str, str] | None, candidates: Candidates, nano_run: Any, tmp_path: Path, nothing_made: None
) -> None:
    other = Path(shutil.copytree(nano_run.folder, tmp_path / "other"))
    report = json.loads((other / "report.json").read_text())
    report |= {"data": "elsewhere", "answers": answers and report["answers"] | answers}
    (other / "report.json").write_text(json.dumps(report))
    models = (*only(candidates, "mobilenet_v3_nano").models, *find_candidates([str(other)], []).models)
    with pytest.raises(UserError, match=r"other: got 359 validation images of elsewhere; expected those of --data"):
        compare(Candidates("digits", models), tmp_path / "out", CORE)
    assert not list((tmp_path / "out").iterdir())


def test_an_unfinished_run_is_refused(nano_run: Any, tmp_path: Path) -> None:
    other = Path(shutil.copytree(nano_run.folder, tmp_path / "other"))
    (other / "report.json").unlink()
    with pytest.raises(UserError, match=r"no report\.json; expected the folder of a finished qat or ptq run"):
        compare(find_candidates([str(other)], []), tmp_path / "out", CORE)


def test_without_an_emulator_it_says_so(
    candidates: Candidates,
    nano_run: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    timed: list[list[Path]],
) -> None:
    def absent() -> None:
        raise UserError("emulated ARM64", "no qemu-aarch64", "emulator and compilers")

    monkeypatch.setattr(build, "prepare", absent)
    record = compare(only(candidates, "run"), tmp_path / "out", CORE)
    assert record.instructions_absent == "emulated ARM64: got no qemu-aarch64; expected emulator and compilers"
    assert record.models[0].instructions is None
    assert record.models[0].run == os.path.relpath(nano_run.folder, tmp_path / "out")


def test_an_output_that_is_a_file(candidates: Candidates, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match="--out"):
        compare(only(candidates, "run"), tmp_path / "out", CORE)
