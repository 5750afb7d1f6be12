"""What a run measures once its files are written: every form's answers, and the report made of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule

from hadaptive_q.data.calibration import Manifest
from hadaptive_q.data.datasets import ImageData, digest, spread
from hadaptive_q.data.transforms import normalise
from hadaptive_q.lower.cpu_features import wanted_arm_features
from hadaptive_q.lower.executorch import Lowered
from hadaptive_q.lower.file_formats import FORMATS, open_file
from hadaptive_q.lower.parity import agreement, compare, output_scale, sqnr_db, top1, topk
from hadaptive_q.lower.runtime import PteFile
from hadaptive_q.models.network import Network
from hadaptive_q.quant.interpreter import IntegerProgram
from hadaptive_q.quant.program import QuantizedProgram
from hadaptive_q.recipe import Recipe
from hadaptive_q.report import measure
from hadaptive_q.report.answers import record_answers
from hadaptive_q.report.record import Accuracy, CoverageRecord, InputRecord, ParityRecord, Report, Size, versions
from hadaptive_q.train.loop import predict

LAYER_SAMPLES = 256


@dataclass(frozen=True)
class FloatModel:
    """A trained float network and its logits over the validation split."""

    model: Network
    logits: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Answers:
    """Logits over the validation split, by form; `onnx` where `model.onnx` was written."""

    quantized: Tensor
    pte: Tensor
    float_pte: Tensor
    onnx: Tensor | None


def find_answers(out: Path, data: ImageData, program: QuantizedProgram) -> Answers:
    """Return what `program` and the files in the folder `out` answer, each in its own runtime."""
    onnx = out / "model.onnx"
    return Answers(
        quantized=predict(program.graph, data.val, program.preprocess)[0],
        pte=PteFile(out / "model.pte").predict(data.val, data.preprocess),
        float_pte=PteFile(out / "float.pte").predict(data.val, data.preprocess),
        onnx=open_file(onnx).predict(data.val, data.preprocess) if onnx.is_file() else None,
    )


def measure_run(
    recipe: Recipe,
    out: Path,
    data: ImageData,
    reference: FloatModel,
    deployed: Network,
    manifest: Manifest,
    program: QuantizedProgram,
    deploy: GraphModule,
    lowered: Lowered,
    answers: Answers,
) -> Report:
    """Return the report of the run in the folder `out`.

    `deployed` is the network whose deploy form is the graph `deploy`, with its selection frozen where the recipe says
    so, `program` what became of it and `lowered` the content of `model.pte`.
    """
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
