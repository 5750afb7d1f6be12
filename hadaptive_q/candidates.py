"""What is to be compared: variants, checkpoints and finished runs, and the recipe of each. Free of torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hadaptive_q.errors import UserError, nearest
from hadaptive_q.models.config import MODELS
from hadaptive_q.recipe import QUANTIZING, Recipe, load_recipe

# A checkpoint of one of these names is called after its folder.
_NAMELESS = ("float", "model")


@dataclass(frozen=True)
class Candidate:
    """A model to compare: `recipe` quantizes it, trained first or from `checkpoint`; or the run in `taken` did."""

    name: str
    recipe: Recipe | None = None
    checkpoint: Path | None = None
    taken: Path | None = None


@dataclass(frozen=True)
class Candidates:
    """The models of a comparison and the data they have in common."""

    data: str
    models: tuple[Candidate, ...]


def find_candidates(
    models: Sequence[str], recipes: Sequence[str], settings: Sequence[str] = (), data: str | None = None
) -> Candidates:
    """Return what `models` name: variants, float checkpoints or folders of finished runs.

    `recipes` are one for all models (``int8`` unless given) and exceptions, ``NAME=RECIPE``; each is loaded with
    `settings`. Without `data`, the recipe for all says on what.
    Raises UserError for an unknown model or recipe, two models of one name, an exception for none of them, and a recipe
    that quantizes nothing.
    """
    named: dict[str, str] = {}
    for model in models:
        name = _name(model)
        if name in named:
            raise UserError(
                f"model {model}", f"the name '{name}' for the second time", "models of different names", "leave one out"
            )
        named[name] = model
    general, exceptions = _assigned(recipes, named)
    data = data or _load(general, settings).data
    own = [*settings, f"data={json.dumps(data)}"]
    return Candidates(data, tuple(_candidate(n, m, exceptions.get(n, general), own) for n, m in named.items()))


def _name(model: str) -> str:
    path = Path(model)
    if model in MODELS:
        return model
    if not path.exists():
        expected = f"one of {', '.join(MODELS)}, a checkpoint or the folder of a run"
        raise UserError(f"model {model}", "neither", expected, nearest(model, MODELS))
    if path.is_dir():
        return path.resolve().name
    return path.resolve().parent.name if path.stem in _NAMELESS else path.stem


def _assigned(recipes: Sequence[str], named: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Return the recipe for all models, and those of single ones by their names."""
    general = [recipe for recipe in recipes if "=" not in recipe]
    if len(general) > 1:
        raise UserError(
            f"--recipe {general[1]}", "a second recipe for all", "one of them, and NAME=RECIPE for single models"
        )
    exceptions: dict[str, str] = {}
    for recipe in recipes:
        name, equals, own = recipe.partition("=")
        if not equals:
            continue
        trained = [one for one, model in named.items() if model in MODELS or Path(model).is_file()]
        if name not in trained or name in exceptions:
            got = "a second recipe for it" if name in exceptions else "a finished run" if name in named else "no model"
            hint = nearest(name, trained)
            raise UserError(f"--recipe {recipe}, {name}", got, f"one recipe for one of {', '.join(trained)}", hint)
        exceptions[name] = own
    return (general or ["int8"])[0], exceptions


def _candidate(name: str, model: str, recipe: str, settings: Sequence[str]) -> Candidate:
    if model in MODELS:
        return Candidate(name, _load(recipe, [*settings, f"model={model}"]))
    if Path(model).is_dir():
        return Candidate(name, taken=Path(model))
    return Candidate(name, _load(recipe, settings), checkpoint=Path(model))


def _load(name: str, settings: Sequence[str]) -> Recipe:
    recipe = load_recipe(name, [*settings])
    if recipe.task not in QUANTIZING:
        raise UserError(f"--recipe {name}", f"a recipe for {recipe.task}", f"one for {' or '.join(QUANTIZING)}")
    return recipe
