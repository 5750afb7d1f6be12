"""A finished run, rebuilt from its folder: the float network, its deploy graph, and the graph that was converted."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.fx import GraphModule

from hadaptive_q.data.calibration import read_manifest, resolve
from hadaptive_q.data.datasets import ImageData
from hadaptive_q.errors import UserError
from hadaptive_q.models.checkpoint import load_model
from hadaptive_q.models.config import Preprocess
from hadaptive_q.models.network import Network
from hadaptive_q.pipeline import on_file_inputs, open_data_for, prepare
from hadaptive_q.quant.backends import torchao_pt2e as backend
from hadaptive_q.quant.program import QuantizedProgram
from hadaptive_q.recipe import Recipe, parse_recipe, read_yaml
from hadaptive_q.report.record import Report, read_report
from hadaptive_q.rewrite.deploy import deploy_graph

PROGRAM_FILES = ("recipe.yaml", "float.safetensors", "float.json", "quantized.safetensors")
# The report is the last file a run writes.
FILES = (*PROGRAM_FILES, "calibration.yaml", "report.json")


@dataclass(frozen=True)
class FinishedRun:
    """What a run worked with: `model` has its selection frozen where the recipe says static.

    `data` and `model` are those of the quantized program: without normalisation where the file takes bytes.
    """

    folder: Path
    recipe: Recipe
    report: Report
    data: ImageData
    model: Network
    deploy: GraphModule
    calibrated: backend.Calibrated

    def program(self) -> QuantizedProgram:
        """Return the quantized program, converted from a copy: `calibrated` stays as it is."""
        return backend.convert(copy.deepcopy(self.calibrated), self.data.preprocess, self.recipe.quantize.input)


def open_run(folder: Path) -> FinishedRun:
    """Rebuild the run in `folder`.

    Raises UserError where `folder` is not a finished run, a file of it is broken, or its data is not what it was.
    """
    check_files(folder, FILES)
    recipe = _recipe(folder)
    report = read_report(folder)
    model = load_model(folder / "float.safetensors")
    data = open_data_for(recipe, model)
    resolve(read_manifest(folder / "calibration.yaml"), data)  # raises where the data changed since
    preprocess, model, deploy, calibrated = _rebuild(folder, recipe, model, data.preprocess)
    return FinishedRun(folder, recipe, report, replace(data, preprocess=preprocess), model, deploy, calibrated)


def open_program(folder: Path) -> QuantizedProgram:
    """Rebuild the quantized program of the run in `folder` without its data.

    Raises UserError where a file it is made of is missing or broken.
    """
    check_files(folder, PROGRAM_FILES)
    recipe, model = _recipe(folder), load_model(folder / "float.safetensors")
    if model.preprocess is None:
        raise UserError(f"{folder / 'float.json'}, preprocess", "nothing", "how images are prepared", "run it again")
    preprocess, _, _, calibrated = _rebuild(folder, recipe, model, model.preprocess)
    return backend.convert(calibrated, preprocess, recipe.quantize.input)


def _recipe(folder: Path) -> Recipe:
    path = folder / "recipe.yaml"
    return parse_recipe(read_yaml(path), str(path))


def _rebuild(
    folder: Path, recipe: Recipe, model: Network, preprocess: Preprocess
) -> tuple[Preprocess, Network, GraphModule, backend.Calibrated]:
    preprocess, model = on_file_inputs(recipe, preprocess, model)
    if recipe.quantize.selection == "static":
        _freeze(model, folder / "selection.json")
    deploy = deploy_graph(model, preprocess.image_size)
    calibrated = backend.restore(prepare(recipe, copy.deepcopy(deploy)), folder / "quantized.safetensors")
    return preprocess, model, deploy, calibrated


def check_files(folder: Path, names: tuple[str, ...]) -> None:
    """Raise UserError unless the files `names` of a run are in `folder`."""
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        found = f"no {', '.join(missing)}" if folder.is_dir() else "no such folder"
        raise UserError(
            f"run {folder}",
            found,
            "the folder of a finished qat or ptq run",
            f"finish it: hadaptive-q qat --out {folder}",
        )


def _freeze(model: Network, path: Path) -> None:
    check_files(path.parent, (path.name,))
    try:
        chosen = json.loads(path.read_text(encoding="utf-8"))
        for name, module in model.ach_modules():
            module.freeze(torch.tensor(chosen[name]))
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(
            str(path), f"'{error}'", "channels for every ACH, as the run wrote them", "run it again"
        ) from error
