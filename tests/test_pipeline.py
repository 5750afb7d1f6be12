"""Every shipped recipe and calibration manifest, from data to the measured file, on the nano network."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import ExportedProgram

from hadaptive_q import errors, pipeline
from hadaptive_q.data.calibration import find_manifest, resolve
from hadaptive_q.data.datasets import ImageData
from hadaptive_q.data.sources import open_data
from hadaptive_q.errors import UserError
from hadaptive_q.evaluate import evaluate_file, evaluate_written
from hadaptive_q.lower.executorch import Lowered, lower
from hadaptive_q.lower.file_input import FileInput
from hadaptive_q.lower.parity import sqnr_db, top1
from hadaptive_q.lower.runtime import PteFile
from hadaptive_q.models.checkpoint import load_model, save_model
from hadaptive_q.models.config import MODELS
from hadaptive_q.models.families import create_model, find_config
from hadaptive_q.models.hadaptive_net import HadaptiveNet
from hadaptive_q.pipeline import quantize, train_float
from hadaptive_q.quant.fake_quant import PerChannelWeightFakeQuantize
from hadaptive_q.quant.sites import find_sites
from hadaptive_q.recipe import Recipe, load_recipe, parse_recipe, shipped
from hadaptive_q.report.record import InputRecord
from hadaptive_q.restore import open_run
from hadaptive_q.train.loop import Training, predict

# Those for data sets from elsewhere run on stand-ins of their layout: test_image_recipes.py.
RECIPES = {name: load_recipe(name) for name in shipped("recipes") if load_recipe(name).data == "digits"}
QUANTIZING = [name for name, recipe in RECIPES.items() if recipe.task != "train"]
TRAINING = [name for name, recipe in RECIPES.items() if recipe.task == "train"]
MANIFESTS = list(shipped("calib"))
DESIGN_KEYS = {
    "model",
    "recipe",
    "recipe_digest",
    "versions",
    "accuracy",
    "size",
    "parity",
    "coverage",
    "ach",
    "latency",
    "arm",
}


def small(name: str, **settings: object) -> Recipe:
    """Return a shipped recipe at a size for tests: the nano network of its family, 32x32, one epoch each."""
    nano = f"{MODELS[load_recipe(name).model]}_nano"
    fields = {"model": nano, "image_size": 32, "float.epochs": 1, "float.lr": 0.005, **settings}
    recipe = load_recipe(name)
    if recipe.fit:
        fields["fit.epochs"] = 1
    return load_recipe(name, [f"{key}={value}" for key, value in fields.items()])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the nano network `model` after one epoch of digits; every recipe starts from it."""

    @functools.cache
    def make(model: str) -> Path:
        out = tmp_path_factory.mktemp("float")
        train_float(small("float", model=model), out)
        return out / "float.safetensors"

    return make


@pytest.fixture(scope="module", autouse=True)
def each_program_is_lowered_once() -> Iterator[None]:
    """Every recipe writes the float file of the one network that they all start from."""
    made: dict[bytes, Lowered] = {}

    def lower_once(program: ExportedProgram) -> Lowered:
        digest = hashlib.sha256(str(program).encode())
        for name, tensor in sorted({**program.state_dict, **program.constants}.items()):
            digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
        if digest.digest() not in made:
            made[digest.digest()] = lower(program)
        return made[digest.digest()]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "lower", lower_once)
        yield


@pytest.mark.parametrize("name", QUANTIZING)
def test_recipe_gives_a_measured_file(name: str, trained: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = small(name)
    report = quantize(recipe, tmp_path, trained(recipe.model), to=("pte", "onnx"))

    assert {p.name for p in tmp_path.iterdir()} >= {
        *("model.pte", "float.pte", "model.onnx", "report.json", "report.md", "report.html"),
        *("recipe.yaml", "calibration.yaml", "float.safetensors", "float.json", "quantized.safetensors"),
    }
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".") or p.suffix == ".state"]
    written = json.loads((tmp_path / "report.json").read_text())
    assert written.keys() >= DESIGN_KEYS
    assert written["accuracy"].keys() >= {"samples", "float_top1", "quantized_top1", "pte_top1", "onnx_top1"}
    assert written["size"]["pte_bytes"] == (tmp_path / "model.pte").stat().st_size
    assert written["size"]["pte_deflated_bytes"] < written["size"]["pte_bytes"]

    # The figures are those of the file: an evaluation that knows nothing of the run finds the same.
    again = evaluate_written(str(tmp_path / "model.pte"), "digits")
    assert again["samples"] == report.accuracy.samples == 359
    assert again["top1"] == report.accuracy.pte_top1
    assert report.parity.integer_identical == 1.0
    assert report.parity.top1_agreement >= 0.95  # an untrained network has many near-ties among its logits
    assert abs(report.accuracy.pte_top1 - report.accuracy.quantized_top1) <= 5
    again = evaluate_written(str(tmp_path / "model.onnx"), "digits")
    assert again["top1"] == report.accuracy.onnx_top1
    assert report.size.onnx_bytes == (tmp_path / "model.onnx").stat().st_size
    parity = report.parity
    assert parity.onnx_top1_agreement is not None
    assert parity.onnx_sqnr_db is not None
    assert parity.onnx_top1_agreement >= 0.99
    assert parity.onnx_sqnr_db > max(20, report.parity.float_sqnr_db)
    assert report.versions.keys() >= {"onnx", "onnxruntime"}
    for page in ("report.md", "report.html"):
        assert "model.onnx" in (tmp_path / page).read_text()

    # The folder holds all that the program was made of.
    run = open_run(tmp_path)
    restored, labels = predict(run.program().graph, run.data.val, run.data.preprocess)
    file = PteFile(tmp_path / "model.pte").predict(run.data.val, run.data.preprocess)
    assert top1(restored, labels) == report.accuracy.quantized_top1
    assert sqnr_db(restored, file) == report.parity.sqnr_db

    static = recipe.quantize.selection == "static"
    assert (report.parity.frozen_agreement is not None) == (report.parity.frozen_sqnr_db is not None) == static

    selections = {ach.selection for ach in report.ach}
    assert selections == ({recipe.quantize.selection} if find_config(recipe.model).selects else set())
    assert report.coverage.delegates == 1
    assert report.coverage.portable_ops == []
    if static:
        assert all(ach.flip_rate == 0 for ach in report.ach)
        chosen = json.loads((tmp_path / "selection.json").read_text())
        assert [len(set(channels)) for channels in chosen.values()] == [6, 6, 8]

    # The resolved recipe is complete: read back, it is the same recipe.
    import yaml

    resolved = parse_recipe(yaml.safe_load((tmp_path / "recipe.yaml").read_text()), "recipe.yaml")
    assert resolved.digest() == report.recipe_digest == recipe.digest()


@pytest.mark.parametrize("name", TRAINING)
def test_training_recipe_gives_a_checkpoint(name: str, tmp_path: Path) -> None:
    data, trained = train_float(small(name), tmp_path)
    assert trained.logits.shape == (len(data.val), 10)
    loaded = load_model(tmp_path / "float.safetensors")
    assert loaded.preprocess == data.preprocess
    # A second call finds the finished training instead of repeating it.
    written = (tmp_path / "float.safetensors").stat().st_mtime_ns
    _, again = train_float(small(name), tmp_path)
    assert (tmp_path / "float.safetensors").stat().st_mtime_ns == written
    assert torch.equal(trained.logits, again.logits)


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest_calibrates_its_data(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = open_data(name, 16)
    checkpoint = tmp_path / "nano.safetensors"
    save_model(create_model("hadaptive_net_nano", data.num_classes), checkpoint)
    recipe = small("int8_ptq", data=name, image_size=16, **{"calibration.manifest": name})
    from hadaptive_q.data.calibration import find_manifest, resolve
    from hadaptive_q.pipeline import quantized_program

    manifest = resolve(find_manifest(recipe.calibration.manifest, data), data)
    assert manifest.digest == find_manifest(name, data).digest
    model = load_model(checkpoint)
    program = quantized_program(recipe, model, data, manifest, tmp_path, teacher=model)
    assert program(torch.zeros(1, 3, 16, 16)).isfinite().all()


def test_nan_in_the_checkpoint_is_named(tmp_path: Path) -> None:
    model = create_model("hadaptive_net_nano", 10)
    with torch.no_grad():
        model.blocks[0].projection.conv.weight[0] = float("nan")
    save_model(model, tmp_path / "nan.safetensors")
    with pytest.raises(UserError, match="NaN"):
        quantize(small("int8_ptq"), tmp_path / "out", tmp_path / "nan.safetensors")


def test_infinite_activations_are_named(tmp_path: Path) -> None:
    model = create_model("hadaptive_net_nano", 10)
    with torch.no_grad():
        model.stem[0].bn.weight.fill_(1e38)
    save_model(model, tmp_path / "huge.safetensors")
    with pytest.raises(UserError, match="calibration"):
        quantize(small("int8_ptq"), tmp_path / "out", tmp_path / "huge.safetensors")
    assert not (tmp_path / "out" / "model.pte").exists()


def test_a_format_whose_packages_are_missing_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(UserError, match=r"format onnx: got no onnxscript .*pip install onnx onnxscript onnxruntime"):
        quantize(small("int8"), tmp_path / "out", to=("onnx",))
    with pytest.raises(UserError, match="pip install"):
        evaluate_file(tmp_path / "model.onnx", "digits")
    assert not (tmp_path / "out").exists()


def test_a_run_to_files_that_take_bytes(trained: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = small("int8_static", **{"quantize.input": "uint8_nchw"})
    report = quantize(recipe, tmp_path, trained(recipe.model), to=("pte", "onnx"))
    assert report.input == InputRecord(dtype="uint8", shape=[1, 3, 32, 32])
    assert (report.coverage.delegates, report.coverage.portable_ops) == (1, [])
    assert report.parity.integer_identical == 1.0
    assert report.parity.frozen_sqnr_db is not None
    assert report.parity.frozen_sqnr_db > 10, "trained, compared and measured on the images the file gets"
    # The float file is the network as trained, on normalised images.
    float_file = evaluate_file(tmp_path / "float.pte", "digits")
    assert float_file["top1"] == pytest.approx(report.accuracy.float_top1, abs=0.3)  # one of 359 images
    for name, top1_ in (("model.pte", report.accuracy.pte_top1), ("model.onnx", report.accuracy.onnx_top1)):
        assert evaluate_file(tmp_path / name, "digits")["top1"] == top1_

    run = open_run(tmp_path)
    restored, _ = predict(run.program().graph, run.data.val, run.data.preprocess)
    file = PteFile(tmp_path / "model.pte")
    assert file.input == FileInput("uint8", (1, 3, 32, 32))
    assert sqnr_db(restored, file.predict(run.data.val, run.data.preprocess)) == report.parity.sqnr_db
    image = find_sites(run.calibrated.graph)[0].quantizer
    assert (float(image.scale), int(image.zero_point)) == (float(torch.tensor(1 / 255)), -128), "trained, but not moved"


def test_a_run_without_onnx_says_nothing_of_it(nano_run: Any) -> None:
    assert nano_run.report.accuracy.onnx_top1 is None
    assert not (nano_run.folder / "model.onnx").exists()
    for page in ("report.md", "report.html"):
        assert "onnx" not in (nano_run.folder / page).read_text()


def test_names_of_layers_are_checked_before_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "train", lambda *_: pytest.fail("trained for a recipe that cannot be kept"))
    recipe = load_recipe("int4_ptq", ["model=hadaptive_net_nano", "quantize.layers.head.clasifier=4"])
    with pytest.raises(UserError, match=r"quantize\.layers, head\.clasifier.*head\.classifier"):
        pipeline.quantize(recipe, tmp_path)


def test_weights_come_down_to_their_bits_while_they_train(
    nano: HadaptiveNet, digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = []

    def epochs(network: nn.Module, _data: ImageData, training: Training) -> None:
        assert training.on_epoch
        for epoch in range(training.config.epochs):
            training.on_epoch(network, epoch)
            packed = [m for m in network.modules() if isinstance(m, PerChannelWeightFakeQuantize) and m.quant_max == 7]
            codes.append({max(quantizer.quant_max, quantizer.refined_max) for quantizer in packed})

    monkeypatch.setattr(pipeline, "train", epochs)
    recipe = load_recipe("int4", ["quantize.rounding=nearest", "fit.epochs=4", "fit.gradual=0.5"])
    manifest = resolve(find_manifest("auto", digits), digits)
    program = pipeline.quantized_program(recipe, copy.deepcopy(nano), digits, manifest, tmp_path, nano)
    assert codes == [{127}, {31}, {7}, {7}]
    assert {form.bits for form in program.plan.weights.values()} == {4, 8}
