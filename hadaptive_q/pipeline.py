"""The main job, step by step. Read this file first.

recipe -> data -> float model -> deploy graph -> prepare -> calibrate -> fit (QAT) -> convert
       -> QUANTIZED PROGRAM -> lower to .pte and other formats (load it, run it, compare it) -> report
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from hadaptive_q import atomic
from hadaptive_q.data.calibration import Manifest, batches, find_manifest, resolve
from hadaptive_q.data.datasets import ImageData
from hadaptive_q.data.sources import open_data
from hadaptive_q.errors import UserError
from hadaptive_q.interruption import KEPT
from hadaptive_q.lower.executorch import lower
from hadaptive_q.lower.file_formats import FORMATS, ModelFile, find_formats
from hadaptive_q.lower.runtime import PteFile
from hadaptive_q.measurement import Answers, FloatModel, find_answers, measure_run
from hadaptive_q.models.checkpoint import load_model, read_training_key, save_model
from hadaptive_q.models.config import Preprocess
from hadaptive_q.models.families import create_model, find_config
from hadaptive_q.models.network import Network
from hadaptive_q.models.pixels import take_pixels
from hadaptive_q.passports import Origin
from hadaptive_q.quant.backends import torchao_pt2e
from hadaptive_q.quant.backends.select import Backend, find_backend
from hadaptive_q.quant.backends.torchao_pt2e import Calibrated
from hadaptive_q.quant.damping import oscillation_damping
from hadaptive_q.quant.gptq import round_with_feedback
from hadaptive_q.quant.plan import make_plan
from hadaptive_q.quant.program import QuantizedProgram, export_graph
from hadaptive_q.recipe import Recipe
from hadaptive_q.report.passport import drop_passport
from hadaptive_q.report.record import Report
from hadaptive_q.report.render import write_report_pages
from hadaptive_q.rewrite.deploy import deploy_graph
from hadaptive_q.rewrite.drop_no_ops import drop_no_ops
from hadaptive_q.rewrite.equalise_multiplications import equalise_multiplications
from hadaptive_q.rewrite.freeze_selection import freeze_selection
from hadaptive_q.train.loop import Training, check_tensorboard, discard_state, predict, train
from hadaptive_q.train.losses import fit_loss, float_loss
from hadaptive_q.train.observe import ObservedGraph, ObservedModel
from hadaptive_q.train.schedule import weight_bits
from hadaptive_q.train.together import from_first, run_folder

log = logging.getLogger(__name__)
QAT_STATE = "qat.state"


def train_float(
    recipe: Recipe, out: Path, checkpoint: Path | None = None, tensorboard: Path | None = None
) -> tuple[ImageData, FloatModel]:
    """Open the data and return the float model: from `checkpoint`, from a finished run in `out`, or trained now.

    A training logs its steps into the folder `tensorboard`.
    Raises UserError where the checkpoint and the data do not fit.
    """
    check_tensorboard(tensorboard)
    with run_folder(out, KEPT) as folder:
        return _float_model(recipe, folder, checkpoint, tensorboard)


def _float_model(
    recipe: Recipe, out: Path, checkpoint: Path | None, tensorboard: Path | None
) -> tuple[ImageData, FloatModel]:
    given = load_model(checkpoint) if checkpoint else None
    data = open_data_for(recipe, given)
    # Of an earlier run in this folder: with its last file gone, what is there no longer counts as finished.
    (out / "report.json").unlink(missing_ok=True)
    model = given or _trained(recipe, data, out, tensorboard)
    if given:
        model.preprocess = data.preprocess
        drop_passport(out / "float.safetensors")
        save_model(model, out / "float.safetensors")
    logits, labels = predict(model.eval(), data.val, data.preprocess)
    origin = Origin(recipe, model.config.name, data.preprocess, labels)
    origin.of_network(out / "float.safetensors", logits, model)
    return data, FloatModel(model, logits, labels)


def quantize(
    recipe: Recipe,
    out: Path,
    checkpoint: Path | None = None,
    to: Sequence[str] = ("pte",),
    tensorboard: Path | None = None,
) -> Report:
    """Run a ``ptq`` or ``qat`` recipe into the folder `out` and return its report.

    `out` gets `model.pte`, `float.pte`, the checkpoints, the resolved recipe and calibration, and the report; and
    `model.FORMAT` for what else `to` names. Each file appears whole; the report is the last. Trainings log their steps
    into the folder `tensorboard`.
    """
    check_tensorboard(tensorboard)
    find_formats(to)
    find_backend(recipe.quantize.backend)  # raises before any training where it is not installed
    with run_folder(out, KEPT) as folder:
        return _quantize(recipe, folder, checkpoint, to, tensorboard)


def _quantize(
    recipe: Recipe, out: Path, checkpoint: Path | None, to: Sequence[str], tensorboard: Path | None
) -> Report:
    data, reference = _float_model(recipe, out, checkpoint, tensorboard)
    manifest = resolve(find_manifest(recipe.calibration.manifest, data), data)
    atomic.write_text(out / "recipe.yaml", recipe.to_yaml())
    atomic.write_text(out / "calibration.yaml", manifest.to_yaml())

    preprocess, teacher = on_file_inputs(recipe, data.preprocess, reference.model)
    seen = replace(data, preprocess=preprocess)
    model = copy.deepcopy(teacher)
    if recipe.quantize.selection == "static":
        chosen = freeze_selection(model, batches(manifest, seen, recipe.calibration.batch_size))
        atomic.write_text(out / "selection.json", json.dumps(chosen) + "\n")
    program = quantized_program(recipe, model, seen, manifest, out, teacher, tensorboard)
    # What is left is done once: processes that trained along wait for the report.
    return from_first(lambda: _files(recipe, out, data, reference, model, manifest, program, to))


def _files(
    recipe: Recipe,
    out: Path,
    data: ImageData,
    reference: FloatModel,
    model: Network,
    manifest: Manifest,
    program: QuantizedProgram,
    to: Sequence[str],
) -> Report:
    """Lower `program`, the quantized form of `model`, and the float network; run the files and report on them."""
    deploy = deploy_graph(model, data.preprocess.image_size)

    # The float file is the network as trained: its selection is not frozen, and it takes normalised images.
    float_graph = deploy_graph(reference.model, data.preprocess.image_size)
    drop_no_ops(float_graph)
    log.info("lowering")
    float_pte = lower(export_graph(float_graph, data.preprocess.image_size))
    quantized_pte = lower(program.export())
    write_checked(out / "float.pte", float_pte.data, PteFile, data)
    write_checked(out / "model.pte", quantized_pte.data, PteFile, data)
    for name in FORMATS.keys() - {"pte"}:
        drop_passport(out / f"model.{name}")
        (out / f"model.{name}").unlink(missing_ok=True)  # of an earlier run in this folder
    for name, format_ in find_formats(to).items():
        if name != "pte":
            write_checked(out / f"model.{name}", format_.lower(program), format_.open, data)

    log.info("running the files over %d validation images", len(data.val))
    answers = find_answers(out, data, program)
    report = measure_run(recipe, out, data, reference, model, manifest, program, deploy, quantized_pte, answers)
    origin = Origin(recipe, report.model, data.preprocess, reference.labels, manifest.digest)
    _write_passports(out, origin, program, answers)
    (out / "explain.json").unlink(missing_ok=True)  # of an earlier run in this folder
    write_report_pages(report, out)
    report.write(out / "report.json")
    (out / QAT_STATE).unlink(missing_ok=True)  # kept till now: who is killed while lowering need not train again
    return report


def quantized_program(
    recipe: Recipe,
    model: Network,
    data: ImageData,
    manifest: Manifest,
    out: Path,
    teacher: Network,
    tensorboard: Path | None = None,
) -> QuantizedProgram:
    """Prepare, calibrate, fit where the recipe trains, and convert `model`; `teacher` is the network as trained."""
    inputs = list(batches(manifest, data, recipe.calibration.batch_size))
    backend = find_backend(recipe.quantize.backend)
    log.info("calibrating on %d images", len(manifest.indices or ()))
    calibrated = calibrate(recipe, deploy_graph(model, data.preprocess.image_size), inputs)
    if recipe.fit:
        log.info("training under quantization: %d epochs", recipe.fit.epochs)
        _fit(recipe, backend, calibrated, teacher, data, manifest, out, tensorboard)
    drop_passport(out / "quantized.safetensors")
    atomic.write_bytes(out / "quantized.safetensors", torchao_pt2e.saved(calibrated))
    return torchao_pt2e.convert(calibrated, data.preprocess, recipe.quantize.input)


def on_file_inputs(recipe: Recipe, preprocess: Preprocess, model: Network) -> tuple[Preprocess, Network]:
    """Return `preprocess` and `model` as the quantized program takes images: not normalised where it takes bytes."""
    if recipe.quantize.input == "float32":
        return preprocess, model
    return preprocess.unnormalised, take_pixels(model, preprocess)


def prepare(recipe: Recipe, graph: GraphModule) -> torchao_pt2e.Prepared:
    """Plan `recipe` on the deploy graph `graph` and insert its fake-quantizers (in place)."""
    return torchao_pt2e.prepare(graph, make_plan(graph, recipe.quantize), recipe.quantize.observer)


def calibrate(recipe: Recipe, graph: GraphModule, inputs: Sequence[Tensor]) -> Calibrated:
    """Prepare the deploy graph `graph` (in place), calibrate it on `inputs` and round its 4-bit weights by `recipe`."""
    if recipe.quantize.equalise:
        equalise_multiplications(graph, inputs)
    calibrated = find_backend(recipe.quantize.backend).calibrate(prepare(recipe, graph), inputs)
    if recipe.quantize.rounding == "gptq":
        round_with_feedback(calibrated, inputs)
    return calibrated


def _fit(
    recipe: Recipe,
    backend: Backend,
    calibrated: Calibrated,
    teacher: Network,
    data: ImageData,
    manifest: Manifest,
    out: Path,
    tensorboard: Path | None,
) -> None:
    fit = recipe.fit
    assert fit is not None

    lowest = min(form.bits for form in calibrated.plan.weights.values())

    def on_epoch(_model: nn.Module, epoch: int) -> None:
        backend.refine_weights(calibrated, weight_bits(epoch, fit.gradual * fit.epochs, lowest))
        if epoch >= fit.freeze_ranges * fit.epochs:
            backend.freeze_ranges(calibrated)

    live = batches(manifest, data, recipe.calibration.batch_size) if fit.batch_norm == "live" else None
    # A student that only follows its teacher, which has no dropout, has nothing to generalise from.
    learned, weights = (ranges == "learned" for ranges in (recipe.quantize.ranges, recipe.quantize.weight_ranges))
    backend.start_fit(calibrated, learned, weights, dropout=fit.distill < 1, live=live)
    training = Training(
        config=fit,
        seed=recipe.seed + 1,
        title="qat",
        state_file=out / QAT_STATE,
        key=f"{recipe.digest()} {weights_digest(teacher)} {manifest.digest}",
        loss=fit_loss(
            fit,
            ObservedModel(teacher.eval()),
            oscillation_damping(calibrated.graph, fit.damping) if fit.damping else None,
        ),
        beside=teacher,
        on_epoch=on_epoch,
        tensorboard=tensorboard,
    )
    train(ObservedGraph(calibrated.graph), data, training)
    backend.refine_weights(calibrated, lowest)
    backend.end_fit(calibrated)


def open_data_for(recipe: Recipe, given: Network | None) -> ImageData:
    """Open the recipe's data the way `given` was trained to see images."""
    trained = given.preprocess if given else None
    size = recipe.image_size or (trained.image_size if trained else None)
    crop = recipe.crop or (trained.crop if trained else None)
    data = open_data(recipe.data, size, crop, recipe.workers)
    config = given.config if given else find_config(recipe.model)
    if recipe.quantize.selection == "static" and not config.selects:
        raise UserError("quantize.selection", "'static'", f"'dynamic': {config.name} selects no channels")
    if data.preprocess.image_size < config.stride:
        raise UserError(
            "image_size", str(data.preprocess.image_size), f"at least {config.stride}, the stride of {config.name}"
        )
    if given and given.config.num_classes != data.num_classes:
        raise UserError(
            "--checkpoint", f"{given.config.num_classes} classes", f"{data.num_classes}, as --data {recipe.data} has"
        )
    if trained and trained.classes != data.preprocess.classes:
        raise UserError(
            "--data", f"classes {_few(data.preprocess.classes)}", f"{_few(trained.classes)} of the checkpoint"
        )
    if trained:
        kept = data.preprocess.model_copy(update={"mean": trained.mean, "std": trained.std})
        return ImageData(data.name, kept, data.train, data.val, data.mirror)
    return data


def _few(classes: tuple[str, ...]) -> str:
    return ", ".join(classes[:3]) + (", ..." if len(classes) > 3 else "")


def _trained(recipe: Recipe, data: ImageData, out: Path, tensorboard: Path | None) -> Network:
    target = out / "float.safetensors"
    parts = [recipe.model, recipe.slot_order, recipe.data, recipe.seed, recipe.float.model_dump(mode="json")]
    key = hashlib.sha256(json.dumps([*parts, data.preprocess.model_dump(mode="json")]).encode()).hexdigest()
    training = Training(recipe.float, recipe.seed, "float", out / "float.state", key)
    if read_training_key(target) == key:
        discard_state(training)  # of a run that was killed just before
        log.info("%s is of this very training: kept", target)
        return load_model(target)
    _check_fit(recipe, data)
    log.info("training %s: %d epochs of %d images", recipe.model, recipe.float.epochs, len(data.train))
    torch.manual_seed(recipe.seed)
    model = _untrained(recipe, data)
    student = ObservedModel(model)
    train(student.train(), data, replace(training, loss=float_loss(recipe.float, student), tensorboard=tensorboard))
    drop_passport(target)
    save_model(model, target, key)
    discard_state(training)
    return model


def _untrained(recipe: Recipe, data: ImageData) -> Network:
    # The order of slots is a matter of networks that fill some by a selection.
    own = {"slot_order": recipe.slot_order} if find_config(recipe.model).selects else {}
    model = create_model(recipe.model, data.num_classes, **own)
    model.preprocess = data.preprocess
    return model


def _check_fit(recipe: Recipe, data: ImageData) -> None:
    """Raise UserError for what `quantize` cannot mean for the network: before it is trained."""
    untrained = _untrained(recipe, data).eval()
    on_file_inputs(recipe, data.preprocess, untrained)
    if recipe.quantize.layers:
        make_plan(deploy_graph(untrained, data.preprocess.image_size), recipe.quantize)


def weights_digest(model: nn.Module) -> str:
    """Return a digest of every tensor of `model`."""
    state = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        state.update(name.encode() + tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def write_checked(path: Path, content: bytes, opened: Callable[[Path], ModelFile], data: ImageData) -> None:
    """Write a file only once its runtime has loaded and run it: what lowers is not always what loads."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)
        file = opened(temporary)
        logits = file(file.input.of(data.val[0][0][None], data.preprocess))
        if logits.shape != (1, data.num_classes) or not logits.isfinite().all():
            raise RuntimeError(f"{path.name}: the lowered file answers {tuple(logits.shape)} with non-finite values")

    drop_passport(path)
    atomic.write_with(path, write)
    log.info("%s: %d bytes", path, len(content))


def _write_passports(out: Path, origin: Origin, program: QuantizedProgram, answers: Answers) -> None:
    origin.of_program(out / "quantized.safetensors", answers.quantized, program)
    origin.of_file(out / "float.pte", answers.float_pte)
    origin.of_file(out / "model.pte", answers.pte, program)
    if answers.onnx is not None:
        origin.of_file(out / "model.onnx", answers.onnx, program)
