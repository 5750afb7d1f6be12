"""A search for mixed precision on the nano network, held against the file that its recipe gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.export import ExportedProgram

from hadaptive_q import search as searching
from hadaptive_q.data.calibration import Manifest, find_manifest, resolve
from hadaptive_q.data.datasets import ImageData
from hadaptive_q.errors import UserError
from hadaptive_q.lower.executorch import Lowered, lower
from hadaptive_q.lower.parity import sqnr_db
from hadaptive_q.lower.runtime import PteFile
from hadaptive_q.models.checkpoint import save_model
from hadaptive_q.models.hadaptive_net import HadaptiveNet
from hadaptive_q.pipeline import quantized_program
from hadaptive_q.quant.formats import WeightFormat
from hadaptive_q.quant.interpreter import IntegerProgram
from hadaptive_q.recipe import Recipe, load_recipe
from hadaptive_q.report.search_listing import search_listing
from hadaptive_q.report.search_record import SearchRecord
from hadaptive_q.search import Goal, search
from hadaptive_q.train.loop import predict

SAMPLES = 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("search")


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Recipe:
    (folder / "few.yaml").write_text(Manifest(source="digits", count=64).to_yaml())
    return load_recipe("int4_ptq", [f"calibration.manifest={json.dumps(str(folder / 'few.yaml'))}"])


@pytest.fixture(scope="module")
def checkpoint(make_nano: Callable[..., HadaptiveNet], digits: ImageData, folder: Path) -> Path:
    model = make_nano()
    model.preprocess = digits.preprocess
    save_model(model, folder / "nano.safetensors")
    return folder / "nano.safetensors"


@pytest.fixture(scope="module")
def refused(recipe: Recipe, checkpoint: Path, folder: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        search(recipe, checkpoint, Goal(target_bytes=1000), folder / "out", SAMPLES)
    return caught.value


@pytest.fixture(scope="module")
def ends(refused: UserError, folder: Path) -> tuple[int, int]:
    """The smallest and the largest file, as the cache says that the refused search left behind."""
    kept = json.loads((folder / "out" / "sensitivity.json").read_text())
    return kept["int8_bytes"] - sum(layer["bytes_saved"] for layer in kept["layers"]), kept["int8_bytes"]


@pytest.fixture(scope="module")
def found(recipe: Recipe, checkpoint: Path, folder: Path, ends: tuple[int, int]) -> SearchRecord:
    """A search for a file a quarter of the way above the smallest; it must not measure anything twice."""

    def measure(*_: object) -> None:
        raise AssertionError("the sensitivities are there")

    def kept(program: ExportedProgram) -> Lowered:
        lowered = lower(program)
        (folder / "mixed.pte").write_bytes(lowered.data)
        return lowered

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(searching, "measure_sensitivity", measure)
        patch.setattr(searching, "lower", kept)
        goal = Goal(target_bytes=ends[0] + (ends[1] - ends[0]) // 4)
        return search(recipe, checkpoint, goal, folder / "out", SAMPLES)


def test_a_size_out_of_reach_is_refused_with_what_is_in_reach(refused: UserError, ends: tuple[int, int]) -> None:
    assert "--target-size 1,000 bytes" in str(refused)
    for end in ends:
        assert f"{end:,}" in str(refused)
    assert ends[0] < 0.95 * ends[1]


def test_the_written_recipe_gives_the_file_that_was_promised(
    found: SearchRecord, checkpoint: Path, folder: Path, make_nano: Callable[..., HadaptiveNet], digits: ImageData
) -> None:
    written = load_recipe(str(folder / "out" / "int4_ptq_mixed.yaml"))
    assert (written.task, written.model, written.data) == ("ptq", "hadaptive_net_nano", "digits")
    assert written.quantize.layers == {layer.layer: layer.bits for layer in found.layers}
    manifest = resolve(find_manifest(written.calibration.manifest, digits), digits)
    model = make_nano()
    program = quantized_program(written, model, digits, manifest, folder, model)
    chosen = [layer for layer in found.layers if layer.bits == 4]
    assert 0 < len(chosen) < len(found.layers)
    assert list(program.plan.weights.values()).count(WeightFormat(4, packed=True)) == len(chosen)
    size = (folder / "mixed.pte").stat().st_size
    assert size == found.pte_bytes
    assert found.target_bytes is not None
    assert size <= found.target_bytes
    assert size == pytest.approx(found.predicted_bytes, rel=0.01)
    shipped = PteFile(folder / "mixed.pte").predict(digits.val, digits.preprocess)
    assert (shipped == predict(IntegerProgram(program), digits.val, digits.preprocess)[0]).all()


def test_what_is_measured_hangs_together(found: SearchRecord, folder: Path) -> None:
    chosen = [layer for layer in found.layers if layer.bits == 4]
    assert all(layer.sensitivity > 0 for layer in found.layers)
    assert found.predicted_noise == pytest.approx(sum(layer.sensitivity for layer in chosen))
    assert found.predicted_bytes == found.int8_bytes - sum(layer.bytes_saved for layer in chosen)
    assert max(layer.sensitivity for layer in chosen) <= found.joint_noise * 2
    # Within a factor of four, 6 dB: errors interact, but what the sum says is about what happens.
    assert found.predicted_noise / 4 < found.joint_noise < found.predicted_noise * 4
    assert found.joint_noise / 2 < found.program_noise < found.joint_noise * 2
    assert found.calibration_images == 64
    assert found.samples == SAMPLES
    sizes, noises = [p.pte_bytes for p in found.front], [p.noise for p in found.front]
    assert sizes == sorted(sizes)
    assert noises == sorted(noises, reverse=True)
    assert (sizes[0], noises[-1]) == (found.smallest_bytes, 0)
    assert SearchRecord.model_validate_json((folder / "out" / "search.json").read_text()) == found
    assert (folder / "out" / "search.png").read_bytes().startswith(b"\x89PNG")


def test_the_table(found: SearchRecord) -> None:
    lines = search_listing(found).splitlines()
    assert max(map(len, lines)) <= 120
    for layer, line in zip(found.layers, lines[1:], strict=False):
        assert line.split() == [layer.layer, f"{layer.bytes_saved:,}", f"{layer.sensitivity:.3e}", str(layer.bits)]
    assert f"{found.pte_bytes:,} bytes" in lines[-3]


def test_the_smallest_file_that_loses_little_enough(
    recipe: Recipe, checkpoint: Path, folder: Path, found: SearchRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It looks at accuracy, not at files, and lowering takes most of the time.
    monkeypatch.setattr(searching, "lower", lambda _: SimpleNamespace(data=b""))
    limit = 100 / SAMPLES * 2.5  # two images
    record = search(recipe, checkpoint, Goal(max_drop=limit), folder / "out", SAMPLES)
    assert record.float_top1 - record.top1 <= limit
    tried = [point for point in record.front if point.top1 is not None]
    assert tried == record.front[: len(tried)], "from the smallest up"
    last = tried[-1]
    assert last.top1 is not None
    assert record.float_top1 - last.top1 <= limit
    assert record.predicted_bytes == last.pte_bytes
    assert [layer.sensitivity for layer in record.layers] == [layer.sensitivity for layer in found.layers]


def test_other_calibration_is_measured_anew(
    recipe: Recipe, checkpoint: Path, folder: Path, found: SearchRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    class MeasuredError(Exception):
        pass

    def measure(*_: object) -> None:
        raise MeasuredError

    monkeypatch.setattr(searching, "measure_sensitivity", measure)
    (folder / "other.yaml").write_text(Manifest(source="digits", count=32).to_yaml())
    calibration = recipe.calibration.model_copy(update={"manifest": str(folder / "other.yaml")})
    with pytest.raises(MeasuredError):
        search(recipe.model_copy(update={"calibration": calibration}), checkpoint, Goal(1000), folder / "out", SAMPLES)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": "another"}'])
def test_a_broken_cache_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "sensitivity.json").write_text(content)
    assert searching._read(tmp_path / "sensitivity.json").get("layers") is None
    assert searching._read(tmp_path / "nowhere.json") == {}


def test_no_drop_that_cannot_be_kept(
    recipe: Recipe, checkpoint: Path, folder: Path, found: SearchRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an accuracy that falls to nothing whatever is rounded."""
    monkeypatch.setattr(searching._Case, "top1", lambda *_: 0.0)
    with pytest.raises(UserError, match=r"--max-drop 0\.5: got a drop of .* points with 8 bits everywhere"):
        search(recipe, checkpoint, Goal(max_drop=0.5), folder / "out", SAMPLES)


def test_sqnr_is_the_noise_in_decibels(found: SearchRecord) -> None:
    signal = torch.ones(1000)
    noisy = signal + found.predicted_noise**0.5
    assert f"{-sqnr_db(signal, noisy):.1f} dB as the sum" in search_listing(found)
