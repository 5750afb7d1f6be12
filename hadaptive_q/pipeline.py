"""The main job, step by step. Read this file first.

recipe -> data -> float model -> deploy graph -> prepare -> calibrate -> fit (QAT) -> convert
       -> QUANTIZED PROGRAM -> lower to .pte and other formats (load it, run it, compare it) -> report
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from hadaptive_q import atomic
from hadaptive_q.data.calibration import Manifest, batches, find_manifest, resolve
from hadaptive_q.data.datasets import ImageData, digest
from hadaptive_q.data.sources import open_data
from hadaptive_q.data.transforms import normalise
from hadaptive_q.errors import UserError
from hadaptive_q.lower.cpu_features import wanted_arm_features
from hadaptive_q.lower.executorch import Lowered, lower
from hadaptive_q.lower.file_formats import FORMATS, ModelFile, find_formats, open_file
from hadaptive_q.lower.parity import agreement, compare, output_scale, sqnr_db, top1, topk
from hadaptive_q.lower.runtime import PteFile
from hadaptive_q.models.checkpoint import load_model, read_training_key, save_model
from hadaptive_q.models.config import VARIANTS, Preprocess
from hadaptive_q.models.hadaptive_net import HadaptiveNet, create_model
from hadaptive_q.models.pixels import take_pixels
from hadaptive_q.passports import Origin
from hadaptive_q.quant.backends import torchao_pt2e
from hadaptive_q.quant.backends.select import Backend, find_backend
from hadaptive_q.quant.backends.torchao_pt2e import Calibrated
from hadaptive_q.quant.damping import oscillation_damping
from hadaptive_q.quant.gptq import round_with_feedback
from hadaptive_q.quant.interpreter import IntegerProgram
from hadaptive_q.quant.plan import make_plan
from hadaptive_q.quant.program import QuantizedProgram, export_graph
from hadaptive_q.recipe import Recipe
from hadaptive_q.report import measure
from hadaptive_q.report.answers import record_answers
from hadaptive_q.report.passport import drop_passport
from hadaptive_q.report.record import Accuracy, CoverageRecord, InputRecord, ParityRecord, Report, Size, versions
from hadaptive_q.report.render import write_report_pages
from hadaptive_q.rewrite.deploy import deploy_graph
from hadaptive_q.rewrite.drop_no_ops import drop_no_ops
from hadaptive_q.rewrite.freeze_selection import freeze_selection
from hadaptive_q.train.loop import Training, discard_state, predict, train
from hadaptive_q.train.losses import fit_loss, float_loss
from hadaptive_q.train.observe import ObservedGraph, ObservedModel

LAYER_SAMPLES = 256
QAT_STATE = "qat.state"


@dataclass(frozen=True)
class FloatModel:
    """A trained float network and its logits over the validation split."""

    model: HadaptiveNet
    logits: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Answers:
    """Logits over the validation split, by form; `onnx` where `model.onnx` was written."""

    quantized: Tensor
    pte: Tensor
    float_pte: Tensor
    onnx: Tensor | None


def train_float(recipe: Recipe, out: Path, checkpoint: Path | None = None) -> tuple[ImageData, FloatModel]:
    """Open the data and return the float model: from `checkpoint`, from a finished run in `out`, or trained now.

    Raises UserError where the checkpoint and the data do not fit.
    """
    with atomic.output_folder(out):
        return _float_model(recipe, out, checkpoint)


def _float_model(recipe: Recipe, out: Path, checkpoint: Path | None) -> tuple[ImageData, FloatModel]:
    given = load_model(checkpoint) if checkpoint else None
    data = open_data_for(recipe, given)
    # Of an earlier run in this folder: with its last file gone, what is there no longer counts as finished.
    (out / "report.json").unlink(missing_ok=True)
    model = given or _trained(recipe, data, out)
    if given:
        model.preprocess = data.preprocess
        drop_passport(out / "float.safetensors")
        save_model(model, out / "float.safetensors")
    logits, labels = predict(model.eval(), data.val, data.preprocess)
    origin = Origin(recipe, model.config.name, data.preprocess, labels)
    origin.of_network(out / "float.safetensors", logits, model)
    return data, FloatModel(model, logits, labels)


def quantize(recipe: Recipe, out: Path, checkpoint: Path | None = None, to: Sequence[str] = ("pte",)) -> Report:
    """Run a ``ptq`` or ``qat`` recipe into the folder `out` and return its report.

    `out` gets `model.pte`, `float.pte`, the checkpoints, the resolved recipe and calibration, and the report; and
    `model.FORMAT` for what else `to` names. Each file appears whole; the report is the last.
    """
    find_formats(to)
    find_backend(recipe.quantize.backend)  # raises before any training where it is not installed
    with atomic.output_folder(out):
        return _quantize(recipe, out, checkpoint, to)


def _quantize(recipe: Recipe, out: Path, checkpoint: Path | None, to: Sequence[str]) -> Report:
    data, reference = _float_model(recipe, out, checkpoint)
    manifest = resolve(find_manifest(recipe.calibration.manifest, data), data)
    atomic.write_text(out / "recipe.yaml", recipe.to_yaml())
    atomic.write_text(out / "calibration.yaml", manifest.to_yaml())

    preprocess, teacher = on_file_inputs(recipe, data.preprocess, reference.model)
    seen = replace(data, preprocess=preprocess)
    model = copy.deepcopy(teacher)
    if recipe.quantize.selection == "static":
        chosen = freeze_selection(model, batches(manifest, seen, recipe.calibration.batch_size))
        atomic.write_text(out / "selection.json", json.dumps(chosen) + "\n")
    program = quantized_program(recipe, model, seen, manifest, out, teacher)
    deploy = deploy_graph(model, data.preprocess.image_size)

    # The float file is the network as trained: its selection is not frozen, and it takes normalised images.
    float_graph = deploy_graph(reference.model, data.preprocess.image_size)
    drop_no_ops(float_graph)
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

    answers = _answers(out, data, program)
    report = _measure(recipe, out, data, reference, model, manifest, program, deploy, quantized_pte, answers)
    origin = Origin(recipe, report.model, data.preprocess, reference.labels, manifest.digest)
    _write_passports(out, origin, program, answers)
    (out / "explain.json").unlink(missing_ok=True)  # of an earlier run in this folder
    write_report_pages(report, out)
    report.write(out / "report.json")
    (out / QAT_STATE).unlink(missing_ok=True)  # kept till now: who is killed while lowering need not train again
    return report


def quantized_program(
    recipe: Recipe, model: HadaptiveNet, data: ImageData, manifest: Manifest, out: Path, teacher: HadaptiveNet
) -> QuantizedProgram:
    """Prepare, calibrate, fit where the recipe trains, and convert `model`; `teacher` is the network as trained."""
    inputs = list(batches(manifest, data, recipe.calibration.batch_size))
    backend = find_backend(recipe.quantize.backend)
    calibrated = calibrate(recipe, deploy_graph(model, data.preprocess.image_size), inputs)
    if recipe.fit:
        _fit(recipe, backend, calibrated, teacher, data, manifest, out)
    drop_passport(out / "quantized.safetensors")
    atomic.write_bytes(out / "quantized.safetensors", torchao_pt2e.saved(calibrated))
    return torchao_pt2e.convert(calibrated, data.preprocess, recipe.quantize.input)


def on_file_inputs(recipe: Recipe, preprocess: Preprocess, model: HadaptiveNet) -> tuple[Preprocess, HadaptiveNet]:
    """Return `preprocess` and `model` as the quantized program takes images: not normalised where it takes bytes."""
    if recipe.quantize.input == "float32":
        return preprocess, model
    return preprocess.unnormalised, take_pixels(model, preprocess)


def prepare(recipe: Recipe, graph: GraphModule) -> torchao_pt2e.Prepared:
    """Plan `recipe` on the deploy graph `graph` and insert its fake-quantizers (in place)."""
    return torchao_pt2e.prepare(graph, make_plan(graph, recipe.quantize), recipe.quantize.observer)


def calibrate(recipe: Recipe, graph: GraphModule, inputs: Sequence[Tensor]) -> Calibrated:
    """Prepare the deploy graph `graph` (in place), calibrate it on `inputs` and round its 4-bit weights by `recipe`."""
    calibrated = find_backend(recipe.quantize.backend).calibrate(prepare(recipe, graph), inputs)
    if recipe.quantize.rounding == "gptq":
        round_with_feedback(calibrated, inputs)
    return calibrated


def _fit(
    recipe: Recipe,
    backend: Backend,
    calibrated: Calibrated,
    teacher: HadaptiveNet,
    data: ImageData,
    manifest: Manifest,
    out: Path,
) -> None:
    fit = recipe.fit
    assert fit is not None

    def on_epoch(_model: nn.Module, epoch: int) -> None:
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
        on_epoch=on_epoch,
    )
    train(ObservedGraph(calibrated.graph, teacher.config.slot_order), data, training)
    backend.end_fit(calibrated)


def open_data_for(recipe: Recipe, given: HadaptiveNet | None) -> ImageData:
    """Open the recipe's data the way `given` was trained to see images."""
    trained = given.preprocess if given else None
    size = recipe.image_size or (trained.image_size if trained else None)
    data = open_data(recipe.data, size)
    config = given.config if given else VARIANTS[recipe.model]
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


def _trained(recipe: Recipe, data: ImageData, out: Path) -> HadaptiveNet:
    target = out / "float.safetensors"
    parts = [recipe.model, recipe.slot_order, recipe.data, recipe.seed, recipe.float.model_dump(mode="json")]
    key = hashlib.sha256(json.dumps([*parts, data.preprocess.model_dump(mode="json")]).encode()).hexdigest()
    training = Training(recipe.float, recipe.seed, "float", out / "float.state", key)
    if read_training_key(target) == key:
        discard_state(training)  # of a run that was killed just before
        return load_model(target)
    _check_layers(recipe, data)
    torch.manual_seed(recipe.seed)
    model = create_model(recipe.model, data.num_classes, slot_order=recipe.slot_order)
    model.preprocess = data.preprocess
    student = ObservedModel(model)
    train(student.train(), data, replace(training, loss=float_loss(recipe.float, student)))
    drop_passport(target)
    save_model(model, target, key)
    discard_state(training)
    return model


def _check_layers(recipe: Recipe, data: ImageData) -> None:
    """Raise UserError for a name in `quantize.layers` that the network will not have: before it is trained."""
    if recipe.quantize.layers:
        untrained = create_model(recipe.model, data.num_classes, slot_order=recipe.slot_order).eval()
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


def _measure(
    recipe: Recipe,
    out: Path,
    data: ImageData,
    reference: FloatModel,
    deployed: HadaptiveNet,
    manifest: Manifest,
    program: QuantizedProgram,
    deploy: GraphModule,
    lowered: Lowered,
    answers: Answers,
) -> Report:
    labels = reference.labels
    quantized, shipped, onnx = answers.quantized, answers.pte, answers.onnx
    file, float_file = PteFile(out / "model.pte"), PteFile(out / "float.pte")
    scale = output_scale(program.graph)
    parity = compare(quantized, shipped, scale)
    onnx_parity = {} if onnx is None else asdict(compare(quantized, onnx, scale))
    integers, _ = predict(IntegerProgram(program), data.val, program.preprocess)
    static = recipe.quantize.selection == "static"
    frozen = predict(deployed.eval(), data.val, program.preprocess)[0] if static else None
    images = torch.stack([data.val[i][0] for i in spread(len(data.val), LAYER_SAMPLES)])
    inputs = normalise(images, program.preprocess)
    overlap = measure.train_eval_overlap(reference.model, normalise(images, data.preprocess))
    return Report(
        model=reference.model.config.name,
        recipe=recipe.name,
        recipe_digest=recipe.digest(),
        calibration_digest=manifest.digest or "",
        data=data.name,
        seed=recipe.seed,
        settings=recipe.model_dump(mode="json"),
        versions=versions(recipe.quantize.backend, *(() if onnx is None else FORMATS["onnx"].packages)),
        accuracy=Accuracy(
            samples=len(labels),
            float_top1=top1(reference.logits, labels),
            quantized_top1=top1(quantized, labels),
            pte_top1=top1(shipped, labels),
            onnx_top1=None if onnx is None else top1(onnx, labels),
            float_top5=topk(reference.logits, labels, 5),
            pte_top5=topk(shipped, labels, 5),
        ),
        answers=record_answers(
            digest(data.val, range(len(labels))),
            labels.tolist(),
            *(logits.argmax(dim=1) == labels for logits in (reference.logits, shipped)),
        ),
        size=Size(
            float_pte_bytes=(out / "float.pte").stat().st_size,
            pte_bytes=len(lowered.data),
            pte_deflated_bytes=measure.deflated_bytes(lowered.data),
            onnx_bytes=None if onnx is None else (out / "model.onnx").stat().st_size,
        ),
        parity=ParityRecord(
            top1_agreement=parity.top1_agreement,
            changed_fraction=parity.changed_fraction,
            max_codes=parity.max_codes,
            sqnr_db=parity.sqnr_db,
            integer_identical=float((integers == shipped).all(dim=1).double().mean()),
            float_agreement=agreement(reference.logits, shipped),
            float_sqnr_db=sqnr_db(reference.logits, shipped),
            frozen_agreement=None if frozen is None else agreement(frozen, shipped),
            frozen_sqnr_db=None if frozen is None else sqnr_db(frozen, shipped),
            **{f"onnx_{key}": value for key, value in onnx_parity.items()},
        ),
        coverage=CoverageRecord(
            **asdict(lowered.coverage), wanted_arm_features=list(wanted_arm_features(lowered.data))
        ),
        input=InputRecord(dtype=file.input.dtype, shape=list(file.input.shape)),
        ach=measure.measure_ach(deploy, program, inputs, overlap),
        layers=measure.measure_layers(deploy, program, inputs),
        weights=measure.measure_weights(deploy, program),
        latency=measure.measure_latency(file, float_file, images[:1], data.preprocess),
    )


def _answers(out: Path, data: ImageData, program: QuantizedProgram) -> Answers:
    onnx = out / "model.onnx"
    return Answers(
        quantized=predict(program.graph, data.val, program.preprocess)[0],
        pte=PteFile(out / "model.pte").predict(data.val, data.preprocess),
        float_pte=PteFile(out / "float.pte").predict(data.val, data.preprocess),
        onnx=open_file(onnx).predict(data.val, data.preprocess) if onnx.is_file() else None,
    )


def _write_passports(out: Path, origin: Origin, program: QuantizedProgram, answers: Answers) -> None:
    origin.of_program(out / "quantized.safetensors", answers.quantized, program)
    origin.of_file(out / "float.pte", answers.float_pte)
    origin.of_file(out / "model.pte", answers.pte, program)
    if answers.onnx is not None:
        origin.of_file(out / "model.onnx", answers.onnx, program)


def spread(length: int, count: int) -> list[int]:
    """Return at most `count` indices spread evenly over ``range(length)``: splits are often sorted by class."""
    return [i * length // min(length, count) for i in range(min(length, count))]
