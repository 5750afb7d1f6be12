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
from hadaptive_q.arm.build import missing
from hadaptive_q.arm.count import count_instructions
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
from hadaptive_q.quant.sensitivity import FourBitLayer
from hadaptive_q.recipe import Recipe, load_recipe
from hadaptive_q.report.plots import pareto_png
from hadaptive_q.report.search_listing import search_listing
from hadaptive_q.report.search_record import SearchRecord
from hadaptive_q.search import Goal, search
from hadaptive_q.train.loop import predict

SAMPLES, CORE = 96, "cortex-a76"


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
        return search(recipe, checkpoint, goal, folder / "out", SAMPLES, None if missing() else CORE)


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
    accuracies = [point.top1 for point in found.front if point.top1 is not None]
    assert len(accuracies) == searching.MEASURED + 1
    assert (accuracies[0], accuracies[-1]) == (found.front[0].top1, found.int8_top1)
    assert SearchRecord.model_validate_json((folder / "out" / "search.json").read_text()) == found
    assert (folder / "out" / "search.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(bool(missing()), reason=missing() or "emulator present")
def test_instructions_are_those_of_the_files(found: SearchRecord, folder: Path) -> None:
    counts = found.instructions
    assert counts is not None
    assert counts.chosen == count_instructions(folder / "mixed.pte", CORE).total
    added = {layer.layer: layer.instructions_added for layer in found.layers}
    assert all(count for count in added.values())
    chosen = [added[layer.layer] or 0 for layer in found.layers if layer.bits == 4]
    assert counts.predicted == counts.int8 + sum(chosen)
    # What a delegate does before its first operator depends a little on what the operators are.
    assert counts.predicted == pytest.approx(counts.chosen, rel=1e-3)
    assert found.front[0].instructions == pytest.approx(counts.smallest, rel=1e-3)
    assert found.front[-1].instructions == counts.int8


def test_without_an_emulator_the_search_says_so(found: SearchRecord) -> None:
    absent = found.model_copy(update={"instructions": None, "instructions_absent": "no emulator"})
    assert search_listing(absent).endswith("instructions: none counted, no emulator")
    assert pareto_png(absent) != pareto_png(found) or found.instructions is None


def test_what_the_recipe_fixes_is_left_alone(
    recipe: Recipe, checkpoint: Path, folder: Path, found: SearchRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def measure(_: object, layers: list[FourBitLayer], __: object) -> list[FourBitLayer]:
        seen.extend(layer.layer for layer in layers)
        return []

    monkeypatch.setattr(searching, "measure_sensitivity", measure)
    quantize = recipe.quantize.model_copy(update={"layers": {"head": 4, "blocks.1": 8}})
    with pytest.raises(UserError, match=r"quantize\.layers: got bits for every layer"):
        search(recipe.model_copy(update={"quantize": quantize}), checkpoint, Goal(1000), folder / "out", SAMPLES)
    free = [layer.layer for layer in found.layers if not layer.layer.startswith(("head.", "blocks.1."))]
    assert 0 < len(free) < len(found.layers)
    assert set(free) <= set(seen)
    assert not any(name.startswith(("head.", "blocks.1.")) for name in seen)
    case = searching._Case(recipe.model_copy(update={"quantize": quantize}), *[None] * 5)  # type: ignore[arg-type]
    case.layers = [FourBitLayer("stem.conv", (), 2, 1)]
    assert case.mixed([]).quantize.layers == {"head": 4, "blocks.1": 8, "stem.conv": 8}


def test_the_table(found: SearchRecord) -> None:
    lines = search_listing(found).splitlines()
    assert max(map(len, lines)) <= 120
    for layer, line in zip(found.layers, lines[1:], strict=False):
        added = "-" if layer.instructions_added is None else f"{layer.instructions_added:+,}"
        figures = [f"{layer.bytes_saved:,}", f"{layer.sensitivity:.3e}", added, str(layer.bits)]
        assert line.split() == [layer.layer, *figures]
    assert f"{found.pte_bytes:,} bytes" in lines[-4]


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
    for path in (tmp_path / "sensitivity.json", tmp_path / "nowhere.json"):
        assert searching._kept(path, "key", lambda: {"measured": 1}) == {"key": "key", "measured": 1}
        assert searching._kept(path, "key", lambda: pytest.fail("it is there")) == {"key": "key", "measured": 1}


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
