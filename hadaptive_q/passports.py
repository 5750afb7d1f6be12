"""Passports of a run's files: written as each file answers, and held against the file later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hadaptive_q.data.transforms import normalise
from hadaptive_q.lower.cpu_features import wanted_arm_features
from hadaptive_q.lower.file_formats import FORMATS, ModelFile, open_file
from hadaptive_q.lower.golden import golden_images
from hadaptive_q.lower.parity import output_scale, top1, topk
from hadaptive_q.models.config import Preprocess
from hadaptive_q.quant.program import QuantizedProgram
from hadaptive_q.recipe import Recipe
from hadaptive_q.report.passport import FileAccuracy, Golden, Passport, file_digest, processor
from hadaptive_q.report.record import InputRecord, versions

# Images as they are, uint8 `(B, 3, S, S)` -> logits `(B, classes)`.
Answers = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Origin:
    """What the files of a run have in common."""

    recipe: Recipe
    model: str
    preprocess: Preprocess
    labels: Tensor
    calibration_digest: str | None = None

    def of_file(self, path: Path, logits: Tensor, program: QuantizedProgram | None = None) -> None:
        """Write the passport of the `.pte` or `.onnx` at `path`, which gave `logits` over the validation split.

        `program` is what it was made of, unless it is a float network.
        """
        kind = path.suffix.removeprefix(".")
        file = open_file(path)
        self._write(
            path,
            file_answers(file, self.preprocess),
            logits,
            step=output_scale(program.graph) if program else None,
            input_=InputRecord(dtype=file.input.dtype, shape=list(file.input.shape)),
            features=wanted_arm_features(program.plan) if program and kind == "pte" else (),
            packages=FORMATS[kind].packages,
        )

    def of_network(self, path: Path, logits: Tensor, network: nn.Module) -> None:
        """Write the passport of the float checkpoint at `path`, which holds `network`."""
        self._write(path, network_answers(network, self.preprocess), logits)

    def of_program(self, path: Path, logits: Tensor, program: QuantizedProgram) -> None:
        """Write the passport of the checkpoint at `path`, from which `program` was converted."""
        answers = network_answers(program.graph, program.preprocess)
        self._write(path, answers, logits, step=output_scale(program.graph))

    def _write(
        self,
        path: Path,
        answers: Answers,
        logits: Tensor,
        *,
        step: float | None = None,
        input_: InputRecord | None = None,
        features: Sequence[str] = (),
        packages: Sequence[str] = (),
    ) -> None:
        golden = answers(golden_images(self.preprocess.image_size))
        Passport(
            file=path.name,
            bytes=path.stat().st_size,
            sha256=file_digest(path),
            model=self.model,
            data=self.recipe.data,
            seed=self.recipe.seed,
            recipe=self.recipe.name,
            recipe_digest=self.recipe.digest(),
            calibration_digest=self.calibration_digest,
            versions=versions(*packages),
            processor=processor(),
            preprocess=self.preprocess,
            input=input_,
            wanted_arm_features=list(features),
            accuracy=FileAccuracy(
                top1=top1(logits, self.labels), top5=topk(logits, self.labels, 5), samples=len(self.labels)
            ),
            golden=Golden(logits=golden.double().tolist(), step=step),
        ).write(path)


def file_answers(file: ModelFile, preprocess: Preprocess) -> Answers:
    """Return how `file` answers in its runtime, one image at a time."""
    return lambda images: torch.cat([file(file.input.of(image[None], preprocess)) for image in images])


def network_answers(network: nn.Module, preprocess: Preprocess) -> Answers:
    """Return how `network` answers in torch, prepared as `preprocess` says."""

    def answer(images: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = network(normalise(images, preprocess))
        return logits

    return answer
