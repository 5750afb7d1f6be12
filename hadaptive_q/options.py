"""Options that several commands share, and what a shell completes in them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, get_args

import typer
from pydantic import BaseModel

from hadaptive_q.arm.cores import CORES
from hadaptive_q.errors import UserError
from hadaptive_q.lower.file_formats import FORMATS
from hadaptive_q.models.config import INPUTS, MODELS
from hadaptive_q.recipe import QUANTIZING, Recipe, load_recipe, shipped

_CHECKPOINTS = (".safetensors", ".pt")


def complete_recipe(context: typer.Context, incomplete: str) -> list[str]:
    """Shipped recipes that the command runs, and recipe files."""
    command = context.info_name or ""
    tasks = {"search": ("train", *QUANTIZING), "compare": QUANTIZING}.get(command, (command,))
    names = [name for name in shipped("recipes") if load_recipe(name).task in tasks]
    return [*_starting(names, incomplete), *_paths(incomplete, ".yaml", ".yml")]


def complete_data(incomplete: str) -> list[str]:
    """The embedded sets and folders."""
    return [*_starting(("digits", "glyphs", "hf:", "hf-stream:"), incomplete), *_paths(incomplete)]


def complete_checkpoint(incomplete: str) -> list[str]:
    """Checkpoints of ours and the authors'."""
    return _paths(incomplete, *_CHECKPOINTS)


def complete_model(incomplete: str) -> list[str]:
    """The network's variants."""
    return _starting(MODELS, incomplete)


def complete_model_or_file(incomplete: str) -> list[str]:
    """The network's variants and checkpoints."""
    return [*complete_model(incomplete), *complete_checkpoint(incomplete)]


def complete_core(incomplete: str) -> list[str]:
    """The emulated cores."""
    return _starting(CORES, incomplete)


def complete_formats(incomplete: str) -> list[str]:
    """The last of a comma-separated list of formats, without those before it."""
    *given, last = incomplete.split(",")
    return [",".join([*given, name]) for name in _starting(FORMATS, last) if name not in given]


def complete_input(incomplete: str) -> list[str]:
    """What a file may take."""
    return _starting(INPUTS, incomplete)


def complete_setting(incomplete: str) -> list[str]:
    """Keys of a recipe, as ``fit.epochs=``."""
    return _starting([f"{key}=" for key in _keys(Recipe)], incomplete)


def _keys(section: type[BaseModel], prefix: str = "") -> Iterable[str]:
    for name, field in section.model_fields.items():
        inner = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
        sections = [kind for kind in inner if issubclass(kind, BaseModel)]
        if sections:
            yield from _keys(sections[0], f"{prefix}{name}.")
        else:
            yield prefix + name


def _starting(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _paths(incomplete: str, *suffixes: str) -> list[str]:
    typed = Path(incomplete)
    folder, start = (typed, "") if incomplete.endswith("/") else (typed.parent, typed.name)
    found = sorted(path for path in folder.glob("*") if path.name.startswith(start))
    return [f"{path}/" if path.is_dir() else str(path) for path in found if path.is_dir() or path.suffix in suffixes]


def default_folder(name: str, data: str) -> Path:
    """Return where the results of `name` on `data` go where nothing else is asked for."""
    source = data.removeprefix("hf:").removeprefix("hf-stream:").partition("#")[0]
    return Path("runs") / f"{name}-{Path(source).stem}"


def parse_size(text: str) -> int:
    """Return the number of bytes that `text` means, with decimal prefixes."""
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([kMG]?)B?", text.strip())
    if not found or not float(found[1]):
        raise UserError(f"--target-size {text}", "no size", "a number of bytes, with kB or MB behind it", "1.4MB")
    return int(float(found[1]) * 1000 ** " kMG".index(found[2] or " ") + 0.5)


Data = Annotated[
    str | None,
    typer.Option(
        help="digits, glyphs, a folder of class folders or tar shards, hf:NAME, or hf-stream:NAME.",
        autocompletion=complete_data,
    ),
]
SomeData = Annotated[
    str,
    typer.Option(
        help="digits, glyphs, a folder of class folders or tar shards, hf:NAME, or hf-stream:NAME.",
        autocompletion=complete_data,
    ),
]
ARecipe = Annotated[
    str, typer.Option(help="A shipped recipe for this command, or a YAML file.", autocompletion=complete_recipe)
]
RecipePerModel = Annotated[
    list[str] | None,
    typer.Option(
        "--recipe",
        help="A recipe for all, int8 unless given, or NAME=RECIPE for one model; repeatable.",
        autocompletion=complete_recipe,
    ),
]
BaseRecipe = Annotated[
    str | None, typer.Option(help="All but the bits: a run's own, else int4_ptq.", autocompletion=complete_recipe)
]
Model = Annotated[str | None, typer.Option(help=f"One of {', '.join(MODELS)}.", autocompletion=complete_model)]
ModelOrFile = Annotated[
    str, typer.Argument(help="A variant's name or a checkpoint.", autocompletion=complete_model_or_file)
]
ModelsOrRuns = Annotated[
    list[str],
    typer.Argument(
        help="Variants' names, float checkpoints, folders of finished runs.", autocompletion=complete_model_or_file
    ),
]
Cores = Annotated[
    list[str] | None,
    typer.Option(help=f"Emulated core, repeatable: {', '.join(CORES)}.", autocompletion=complete_core),
]
CountedCore = Annotated[
    str,
    typer.Option(help=f"Emulated core to count instructions on: {', '.join(CORES)}.", autocompletion=complete_core),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only errors on standard error, no progress.")]
Out = Annotated[Path | None, typer.Option(help="Folder for the results; runs/RECIPE-DATA unless given.")]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        help="Float model to start from: .safetensors or an authors' .pt.", autocompletion=complete_checkpoint
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Replace a recipe field: key.path=value.", autocompletion=complete_setting),
]
Seed = Annotated[int | None, typer.Option(help="Seed of every random number.")]
To = Annotated[
    str,
    typer.Option(
        help=f"Formats: {','.join(FORMATS)}, or some of them; a run has its .pte anyway.",
        autocompletion=complete_formats,
    ),
]
Input = Annotated[
    str | None,
    typer.Option(
        "--input",
        help=f"What the file takes: {', '.join(INPUTS)}; uint8 is RGB bytes, NHWC.",
        autocompletion=complete_input,
    ),
]
TensorBoard = Annotated[
    Path | None, typer.Option("--tensorboard", help="Folder for TensorBoard's curves of every training.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
