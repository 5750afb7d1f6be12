"""The command that compares models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hadaptive_q import options as given
from hadaptive_q.arm.cores import find_core
from hadaptive_q.candidates import find_candidates
from hadaptive_q.interruption import resumable

compared = typer.Typer()


@compared.command()
def compare(
    models: given.ModelsOrRuns,
    data: given.Data = None,
    recipe: given.RecipePerModel = None,
    core: given.CountedCore = "cortex-a76",
    out: Annotated[Path | None, typer.Option(help="Folder for runs and pages; runs/compare-DATA unless given.")] = None,
    set_: given.Settings = None,
    as_json: given.AsJson = False,
) -> None:
    """Train or load models, quantize and lower them on the same data, and measure them side by side.

    What fails is said and the others go on; exit code 1 then. Finished runs in the folder are not repeated.
    """
    find_core(core)
    candidates = find_candidates(models, recipe or [], set_ or [], data)
    from hadaptive_q.compare import compare as compare_models
    from hadaptive_q.report.comparison_listing import comparison_listing

    folder = out or given.default_folder("compare", candidates.data)
    record = resumable(lambda: compare_models(candidates, folder, core), folder)
    if as_json:
        typer.echo(record.model_dump_json(indent=1))
    else:
        typer.echo(comparison_listing(record))
        typer.echo(f"page: {folder / 'compare.html'}")
    if record.failed:
        raise typer.Exit(1)
