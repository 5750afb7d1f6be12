"""Hold a file against its passport: the same bytes, the same answers to the golden images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from hadaptive_q.errors import UserError
from hadaptive_q.lower.file_formats import FORMATS, find_formats, open_file
from hadaptive_q.lower.golden import golden_images
from hadaptive_q.lower.isolated import isolated
from hadaptive_q.models.checkpoint import load_model
from hadaptive_q.passports import Answers, file_answers, network_answers
from hadaptive_q.recipe import load_recipe
from hadaptive_q.report.passport import (
    ARTEFACTS,
    SUFFIX,
    Passport,
    file_digest,
    passport_path,
    processor,
    read_passport,
)
from hadaptive_q.report.record import versions
from hadaptive_q.restore import open_program

LIMIT_S = 600.0
# Elsewhere float arithmetic rounds otherwise: a score near its neighbour can choose another channel.
CODES_ELSEWHERE = 2
# Of the largest logit: some twenty layers of float32 sums, added up in another order.
FLOAT_TOLERANCE = 1e-4


class Verdict(TypedDict):
    """What was found of one file: `problems` where it fails, `notes` where it agrees."""

    file: str
    problems: list[str]
    notes: list[str]


def verify(path: Path, answers: bool = True) -> list[Verdict]:
    """Return what became of `path`, a file with a passport beside it, or of every such file in the folder of a run.

    A `.pte` and an `.onnx` run in a process of their own. Where versions and processor are those of the passport,
    their logits must be the same bit for bit; elsewhere, and for checkpoints, the classes the same and the logits
    within 2 codes or 1e-4 of the largest. Without `answers` only bytes are compared.
    Raises UserError where there is no passport, and where a checkpoint cannot be rebuilt.
    """
    if not path.exists():
        raise UserError(f"verify {path}", "no such file", "a file with a passport beside it, or the folder of a run")
    files = [path] if path.is_file() else _artefacts(path)
    return [_verify(file, answers) for file in files]


def _artefacts(folder: Path) -> list[Path]:
    named = [passport.with_name(passport.name.removesuffix(SUFFIX)) for passport in folder.glob(f"*{SUFFIX}")]
    files = sorted({*named, *(file for kind in ARTEFACTS for file in folder.glob(f"*.{kind}"))})
    if not files:
        raise UserError(f"verify {folder}", "no model files", "the folder of a finished run")
    return files


def _verify(file: Path, answers: bool) -> Verdict:
    if not file.is_file():
        return {"file": str(file), "problems": ["it is gone: only its passport is here"], "notes": []}
    passport = read_passport(file)
    problems = _changes(file, passport)
    # What is not the file that was measured is not worth running.
    notes = _answers(file, passport, problems) if answers and not problems else []
    return {"file": str(file), "problems": problems, "notes": notes}


def _changes(file: Path, passport: Passport) -> list[str]:
    problems = []
    if passport.digest != passport.own_digest():
        problems.append(f"{passport_path(file).name} was changed: its digest is not that of its content")
    size = file.stat().st_size
    if size != passport.bytes:
        problems.append(f"{size:,} bytes, and {passport.bytes:,} when it was measured")
    elif file_digest(file) != passport.sha256:
        problems.append("its bytes are not those that were measured")
    recipe = file.with_name("recipe.yaml")
    if recipe.is_file() and load_recipe(str(recipe)).digest() != passport.recipe_digest:
        problems.append(f"{recipe.name} beside it is not the recipe it was made by ({passport.recipe})")
    return problems


def _answers(file: Path, passport: Passport, problems: list[str]) -> list[str]:
    """Run the golden images, add what is wrong to `problems` and return what is right."""
    kind = file.suffix.removeprefix(".")
    try:
        if kind in FORMATS:
            find_formats([kind])
            found = torch.tensor(isolated(golden_answers, f"file {file}", str(file), limit_s=LIMIT_S))
        else:
            found = _checkpoint(file)(golden_images(passport.preprocess.image_size))
    except UserError as error:
        problems.append(str(error))
        return []
    wanted = torch.tensor(passport.golden.logits, dtype=found.dtype)
    if found.shape != wanted.shape:
        problems.append(f"{tuple(found.shape)} logits on the golden images, and {tuple(wanted.shape)} then")
        return []
    if torch.equal(found, wanted):
        return ["the same logits on the golden images, bit for bit"]
    here = [name for name, version in passport.versions.items() if versions().get(name, version) != version]
    elsewhere = bool(here) or passport.processor != processor()
    difference = _difference(found, wanted, passport.golden.step)
    same_classes = torch.equal(found.argmax(dim=1), wanted.argmax(dim=1))
    if same_classes and difference.small and (elsewhere or kind not in FORMATS):
        return [f"logits on the golden images within {difference}"]
    also = f"; other versions here of {', '.join(here)}" if here else ""
    also += "" if passport.processor == processor() else f"; measured on {passport.processor}"
    problems.append(f"logits on the golden images off by {difference}{also}")
    return []


@dataclass(frozen=True)
class _Difference:
    text: str
    small: bool

    def __str__(self) -> str:
        return self.text


def _difference(found: Tensor, wanted: Tensor, step: float | None) -> _Difference:
    largest = float((found.double() - wanted.double()).abs().max())
    if step is not None:
        codes = round(largest / step)
        return _Difference(f"{codes} codes", codes <= CODES_ELSEWHERE)
    share = largest / float(wanted.abs().max())
    return _Difference(f"{share:.1e} of the largest", share <= FLOAT_TOLERANCE)


def golden_answers(name: str) -> list[list[float]]:
    """Return the logits of the file called `name` on the golden images, run in this very process."""
    file = Path(name)
    preprocess = read_passport(file).preprocess
    logits = file_answers(open_file(file), preprocess)(golden_images(preprocess.image_size))
    answers: list[list[float]] = logits.double().tolist()
    return answers


def _checkpoint(file: Path) -> Answers:
    if file.stem == "quantized":
        program = open_program(file.parent)
        return network_answers(program.graph, program.preprocess)
    model = load_model(file)
    assert model.preprocess is not None
    return network_answers(model, model.preprocess)
