"""The commands that share a run and take one back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

share = typer.Typer()
Revision = Annotated[str | None, typer.Option(help="A branch or a commit of the repository.")]


@share.command()
def push(
    run: Annotated[Path, typer.Argument(help="The folder of a finished qat or ptq run.")],
    name: Annotated[str, typer.Argument(help="The repository on the Hugging Face hub: user/repository.")],
    private: Annotated[bool, typer.Option("--private", help="Create the repository for you alone.")] = False,
    revision: Revision = None,
) -> None:
    """Upload a run with a model card: the files, their passports, the report, the recipe."""
    from hadaptive_q.share import push_to_hub

    typer.echo(push_to_hub(run, name, private, revision))


@share.command()
def pull(
    name: Annotated[str, typer.Argument(help="A repository on the Hugging Face hub, or the folder of a shared run.")],
    out: Annotated[Path, typer.Option(help="The folder the run goes into.")],
    revision: Revision = None,
) -> None:
    """Take a shared run into a folder; its files are held against their passports first."""
    from hadaptive_q.report.record import read_report
    from hadaptive_q.share import pull as pull_run

    pull_run(name, out, revision)
    report = read_report(out)
    typer.echo(f"{out}: {report.model}, {report.recipe}, {report.data}; top-1 {report.accuracy.pte_top1:.2f} %")
