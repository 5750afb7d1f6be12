"""Whether a folder holds a finished run, so that nobody makes it again."""

from __future__ import annotations

from pathlib import Path

from hadaptive_q.errors import UserError
from hadaptive_q.models.checkpoint import load_model, read_training_key
from hadaptive_q.pipeline import weights_digest
from hadaptive_q.recipe import Recipe
from hadaptive_q.report.record import Report, read_report
from hadaptive_q.restore import FILES, check_files
from hadaptive_q.verify import verify

# The quantized file and the float one.
PTE_FILES = ("model.pte", "float.pte")


def read_finished(folder: Path) -> Report:
    """Return the report of the finished run in `folder`.

    Raises UserError where `folder` is none, and where its files are not those that were measured.
    """
    check_files(folder, (*FILES, *PTE_FILES))
    for name in PTE_FILES:
        (verdict,) = verify(folder / name, answers=False)
        if verdict["problems"]:
            got = f"'{verdict['problems'][0]}'"
            raise UserError(f"file {folder / name}", got, "the file that its report is about", "run it again")
    return read_report(folder)


def find_finished(recipe: Recipe, folder: Path, checkpoint: Path | None) -> Report | None:
    """Return the report of the run in `folder` where it is that of `recipe` from `checkpoint`, or None.

    Without a checkpoint it must have trained its float network itself.
    """
    own = folder / "float.safetensors"
    try:
        report = read_finished(folder)
        if report.recipe_digest != recipe.digest():
            return None
        if checkpoint is None:
            return report if read_training_key(own) else None
        return report if weights_digest(load_model(own)) == weights_digest(load_model(checkpoint)) else None
    except UserError:  # a broken run is made anew, and a broken checkpoint refused then
        return None
