"""The command line. Every command imports what it needs when it runs: `--help` and mistakes answer at once."""

from __future__ import annotations

import io
import json
import logging
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hadaptive_q import options as given
from hadaptive_q import processes
from hadaptive_q.arm.cores import find_core
from hadaptive_q.cli_compare import compared
from hadaptive_q.cli_share import share
from hadaptive_q.errors import UserError, nearest
from hadaptive_q.examples import epilog
from hadaptive_q.interruption import resumable
from hadaptive_q.lower.file_formats import find_formats
from hadaptive_q.models.config import INPUTS, MODELS
from hadaptive_q.progress import shown
from hadaptive_q.recipe import Recipe, load_recipe, shipped

log = logging.getLogger(__name__)
app = typer.Typer(
    help="Quantize and compress Hadaptive-Net for ARM phones, and measure the file that ships.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def start(context: typer.Context, quiet: given.Quiet = False) -> None:
    """Show progress on standard error as long as the command runs; results are on standard output."""
    silent = processes.index() > 0  # of several processes the first one speaks
    context.with_resource(shown(quiet or silent))
    if silent:
        context.with_resource(redirect_stdout(io.StringIO()))


def _recipe(name: str, settings: list[str] | None, task: Literal["train", "ptq", "qat"], **fields: Any) -> Recipe:
    given = [f"{key}={json.dumps(value)}" for key, value in fields.items() if value is not None]
    recipe = load_recipe(name, [*given, *(settings or [])])
    if recipe.task != task:
        raise UserError(
            f"--recipe {name}", f"a recipe for {recipe.task}", f"one for {task}", f"run: hadaptive-q {recipe.task}"
        )
    return recipe


def _quantizing(
    name: str, settings: list[str] | None, task: Literal["ptq", "qat"], input_: str | None, **fields: Any
) -> Recipe:
    if input_ is not None and input_ not in INPUTS:
        raise UserError(f"--input {input_}", "an unknown input", f"one of {', '.join(INPUTS)}", nearest(input_, INPUTS))
    return _recipe(name, settings, task, **fields, **{"quantize.input": input_})


def _folder(recipe: Recipe, out: Path | None) -> Path:
    return out or given.default_folder(recipe.name, recipe.data)


@app.command()
def train(
    model: given.Model = None,
    data: given.Data = None,
    out: given.Out = None,
    recipe: given.ARecipe = "float",
    set_: given.Settings = None,
    seed: given.Seed = None,
    tensorboard: given.TensorBoard = None,
    as_json: given.AsJson = False,
) -> None:
    """Train a float network."""
    resolved = _recipe(recipe, set_, "train", model=model, data=data, seed=seed)
    from hadaptive_q.lower.parity import top1
    from hadaptive_q.pipeline import train_float

    folder = _folder(resolved, out)
    _, trained = resumable(lambda: train_float(resolved, folder, tensorboard=tensorboard), folder)
    accuracy = top1(trained.logits, trained.labels)
    where = folder / "float.safetensors"
    if as_json:
        typer.echo(json.dumps({"checkpoint": str(where), "float_top1": accuracy, "samples": len(trained.labels)}))
    else:
        typer.echo(f"{where}: top-1 {accuracy:.2f} % on {len(trained.labels)} images")


@app.command()
def qat(
    recipe: given.ARecipe = "int8",
    model: given.Model = None,
    checkpoint: given.Checkpoint = None,
    data: given.Data = None,
    out: given.Out = None,
    input_: given.Input = None,
    set_: given.Settings = None,
    seed: given.Seed = None,
    to: given.To = "pte",
    tensorboard: given.TensorBoard = None,
    as_json: given.AsJson = False,
) -> None:
    """Quantize with training: float model (trained first if none is given), QAT, .pte, report."""
    resolved = _quantizing(recipe, set_, "qat", input_, model=model, data=data, seed=seed)
    _quantize(resolved, checkpoint, out, to, tensorboard, as_json)


@app.command()
def ptq(
    recipe: given.ARecipe = "int8_ptq",
    model: given.Model = None,
    checkpoint: given.Checkpoint = None,
    data: given.Data = None,
    out: given.Out = None,
    input_: given.Input = None,
    set_: given.Settings = None,
    seed: given.Seed = None,
    to: given.To = "pte",
    tensorboard: given.TensorBoard = None,
    as_json: given.AsJson = False,
) -> None:
    """Quantize without training: float model, calibration, .pte, report."""
    resolved = _quantizing(recipe, set_, "ptq", input_, model=model, data=data, seed=seed)
    _quantize(resolved, checkpoint, out, to, tensorboard, as_json)


def _quantize(
    recipe: Recipe, checkpoint: Path | None, out: Path | None, to: str, tensorboard: Path | None, as_json: bool
) -> None:
    formats = _formats(to)
    from hadaptive_q.pipeline import quantize

    folder = _folder(recipe, out)
    report = resumable(lambda: quantize(recipe, folder, checkpoint, formats, tensorboard), folder)
    if as_json:
        typer.echo(report.model_dump_json(indent=1))
        return
    accuracy, size, parity = report.accuracy, report.size, report.parity
    typer.echo(
        f"{folder / 'model.pte'}: {size.pte_bytes:,} bytes, {size.pte_bytes / size.float_pte_bytes:.3f} of float"
    )
    typer.echo(
        f"top-1 {accuracy.pte_top1:.2f} % in the ExecuTorch runtime on {accuracy.samples} images"
        f" (float {accuracy.float_top1:.2f} %, quantized program {accuracy.quantized_top1:.2f} %)"
    )
    if report.input:
        typer.echo(f"input: {report.input.dtype} ({', '.join(map(str, report.input.shape))})")
    typer.echo(f"same top-1 as the quantized program: {100 * parity.top1_agreement:.2f} %")
    if accuracy.onnx_top1 is not None:
        typer.echo(f"{folder / 'model.onnx'}: top-1 {accuracy.onnx_top1:.2f} % in onnxruntime")
    typer.echo(f"report: {folder / 'report.html'}")


def _formats(names: str) -> list[str]:
    """Return the formats in a comma-separated list; what cannot be written is refused before any work."""
    return list(find_formats([name.strip() for name in names.split(",")]))


@app.command("eval")
def evaluate(
    file: Annotated[Path, typer.Argument(help="A checkpoint, a .pte or an .onnx.")],
    data: given.SomeData = "digits",
    as_json: given.AsJson = False,
) -> None:
    """Measure top-1 and top-5 of a file in its own runtime over the validation split."""
    from hadaptive_q.evaluate import evaluate_file

    result = evaluate_file(file, data)
    if as_json:
        typer.echo(json.dumps(result))
    else:
        typer.echo(f"{file}: top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} % on {result['samples']} images")


@app.command()
def bench(
    files: Annotated[list[Path], typer.Argument(help="One or more .pte files, ours or not.")],
    core: given.Cores = None,
    operators: Annotated[bool, typer.Option(help="Break instructions down by operator.")] = False,
    compare: Annotated[Path | None, typer.Option(help="Print every figure as a ratio to this .pte.")] = None,
    as_json: given.AsJson = False,
) -> None:
    """Measure latency on this host and instructions per inference on emulated ARM64 cores."""
    from hadaptive_q.bench import bench_files, ratios
    from hadaptive_q.report.bench_listing import bench_listing

    for name in core or []:
        find_core(name)
    results = bench_files([*files, *([compare] if compare else [])], core or [], operators)
    if compare:
        for result in results:
            result["of_compared"] = ratios(result, results[-1])
    typer.echo(json.dumps(results) if as_json else bench_listing(results))


@app.command()
def check(
    run: Annotated[Path, typer.Argument(help="The folder of a run, or its report.json.")],
    budget: Annotated[list[str] | None, typer.Option(help="Such as 'coverage.fp32_ops == 0'; repeatable.")] = None,
    baseline: Annotated[Path | None, typer.Option(help="Baseline of an earlier run to compare with, a JSON.")] = None,
    update_baseline: Annotated[
        bool, typer.Option("--update-baseline", help="Make this run the baseline, if it keeps its budgets.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Budgets that too few images decide are broken.")] = False,
    as_json: given.AsJson = False,
) -> None:
    """Hold a run against budgets and a baseline; exit code 1 where it does not keep one."""
    from hadaptive_q.regress import hold

    outcome = hold(run, budget or [], baseline, update_baseline, strict)
    typer.echo(json.dumps(outcome.as_json()) if as_json else outcome)
    if outcome.broken:
        raise typer.Exit(1)


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="A file with its passport beside it, or the folder of a run.")],
    as_json: given.AsJson = False,
) -> None:
    """Hold files against their passports: the same bytes, the same answers; exit code 1 where one is not itself."""
    from hadaptive_q.verify import verify as verify_files

    verdicts = verify_files(path)
    if as_json:
        typer.echo(json.dumps(verdicts))
    else:
        for verdict in verdicts:
            typer.echo(f"{verdict['file']}: {'; '.join([*verdict['problems'], *verdict['notes']])}")
    if any(verdict["problems"] for verdict in verdicts):
        raise typer.Exit(1)


@app.command()
def explain(
    run: Annotated[Path, typer.Argument(help="The folder of a finished qat or ptq run.")],
    layer: Annotated[list[str] | None, typer.Option(help="Only this module and what is inside it, repeatable.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Validation images, spread over the split.")] = 64,
    as_json: given.AsJson = False,
) -> None:
    """Say who is to blame, layer by layer: formats, ranges, SQNR, flips, and the share of the output error.

    Without --layer it goes into the run's report, too, and into explain.json beside it.
    """
    from hadaptive_q.explain import explain as explain_run
    from hadaptive_q.explain import write_explanation
    from hadaptive_q.report.listing import listing
    from hadaptive_q.restore import open_run

    finished = open_run(run)
    explanation = explain_run(finished, layer or [], samples)
    typer.echo(explanation.model_dump_json(indent=1) if as_json else listing(explanation, whole=bool(layer)))
    if not layer:
        write_explanation(finished, explanation)
        log.info("report: %s", run / "report.html")


@app.command()
def search(
    start: Annotated[Path, typer.Argument(help="A float checkpoint, or the folder of a finished qat or ptq run.")],
    target_size: Annotated[str | None, typer.Option(help="The most the file may have: 1.4MB, 900kB or bytes.")] = None,
    max_drop: Annotated[
        float | None, typer.Option(min=0, help="The most top-1 may lose against float, in points.")
    ] = None,
    data: given.Data = None,
    recipe: given.BaseRecipe = None,
    samples: Annotated[int, typer.Option(min=1, help="Validation images, spread over the split.")] = 2048,
    core: given.CountedCore = "cortex-a76",
    out: given.Out = None,
    input_: given.Input = None,
    set_: given.Settings = None,
    as_json: given.AsJson = False,
) -> None:
    """Choose layers for 4-bit weights by their noise and write a recipe with them; no training."""
    find_core(core)
    if (target_size is None) == (max_drop is None):
        got = "neither" if target_size is None else "both"
        raise UserError("--target-size and --max-drop", got, "one of them", "such as --target-size 1.4MB")
    target = None if target_size is None else given.parse_size(target_size)
    finished = (start / "recipe.yaml").is_file()
    base = recipe or (str(start / "recipe.yaml") if finished else "int4_ptq")
    task = load_recipe(base).task
    resolved = _quantizing(base, set_, "ptq" if task == "train" else task, input_, data=data)
    from hadaptive_q.report.search_listing import search_listing
    from hadaptive_q.search import Goal, recipe_file
    from hadaptive_q.search import search as search_bits

    folder = out or Path(f"{_folder(resolved, None)}-search")
    checkpoint = start / "float.safetensors" if finished else start
    record = search_bits(resolved, checkpoint, Goal(target, max_drop), folder, samples, core)
    if as_json:
        typer.echo(record.model_dump_json(indent=1))
        return
    typer.echo(search_listing(record))
    typer.echo(f"recipe: {recipe_file(resolved, folder)}; plot: {folder / 'search.png'}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The folder of a finished qat or ptq run.")],
    to: given.To = "onnx",
    out: Annotated[Path | None, typer.Option(help="Folder for the files; the run's own unless given.")] = None,
    as_json: given.AsJson = False,
) -> None:
    """Write the quantized program of a finished run in other formats."""
    formats = _formats(to)
    from hadaptive_q.export import export_run

    written = {str(path): path.stat().st_size for path in export_run(run, formats, out or run)}
    if as_json:
        typer.echo(json.dumps([{"file": file, "bytes": size} for file, size in written.items()]))
        return
    for file, size in written.items():
        typer.echo(f"{file}: {size:,} bytes")


@app.command("import")
def import_(
    checkpoint: Annotated[Path, typer.Argument(help="An authors' checkpoint (.pt).")],
    out: Annotated[Path, typer.Option(help="Folder for model.safetensors and model.json.")],
) -> None:
    """Turn an authors' checkpoint into safetensors; nothing in the file is executed."""
    from hadaptive_q.atomic import output_folder
    from hadaptive_q.models.checkpoint import load_model, save_model

    model = load_model(checkpoint)
    with output_folder(out):
        save_model(model, out / "model.safetensors")
    typer.echo(f"{out / 'model.safetensors'}: {model.config.num_classes} classes, {len(model.blocks)} blocks")


@app.command()
def info(
    model: given.ModelOrFile,
    classes: Annotated[int, typer.Option(min=1, help="Classes of a variant; a checkpoint has its own.")] = 100,
    image_size: Annotated[int, typer.Option(min=1, help="Side of the input in pixels.")] = 224,
    as_json: given.AsJson = False,
) -> None:
    """Print parameters, multiply-accumulates and stages."""
    if model not in MODELS and not Path(model).exists():
        raise UserError(f"model {model}", "neither", f"one of {', '.join(MODELS)} or a file", nearest(model, MODELS))
    from hadaptive_q.models.checkpoint import load_model
    from hadaptive_q.models.families import create_model
    from hadaptive_q.models.network import count_macs, count_parameters

    network = create_model(model, classes) if model in MODELS else load_model(model)
    if image_size < network.config.stride:
        raise UserError("--image-size", str(image_size), f"at least {network.config.stride}, the network's stride")
    stages = [block.model_dump() for block in network.config.stages]
    result: dict[str, Any] = {
        "model": network.config.name,
        "classes": network.config.num_classes,
        "image_size": image_size,
        "params": count_parameters(network),
        "macs": count_macs(network, image_size),
        "stages": stages,
    }
    if as_json:
        typer.echo(json.dumps(result))
        return
    typer.echo(f"{result['model']}: {result['params']:,} parameters, {result['macs'] / 1e6:.1f} M MACs at {image_size}")
    for index, stage in enumerate(stages):
        typer.echo(f"  block {index}: " + ", ".join(f"{key} {value}" for key, value in stage.items()))


@app.command()
def recipes(as_json: given.AsJson = False) -> None:
    """List the shipped recipes."""
    found = {name: load_recipe(name) for name in shipped("recipes")}
    if as_json:
        typer.echo(json.dumps({name: recipe.model_dump(mode="json") for name, recipe in found.items()}))
        return
    for name, path in shipped("recipes").items():
        purpose = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        typer.echo(f"{name:14} {found[name].task:6} {purpose}")


@app.command()
def doctor(
    run: Annotated[bool, typer.Option("--run", help="Also lower a tiny network and run it: some seconds.")] = False,
    as_json: given.AsJson = False,
) -> None:
    """Say what this environment has and what is missing; exit code 1 where the main job cannot work."""
    from hadaptive_q.doctor import examine, listing, works

    findings = examine(run)
    typer.echo(json.dumps([vars(finding) for finding in findings]) if as_json else listing(findings))
    if not works(findings):
        raise typer.Exit(1)


app.registered_commands += compared.registered_commands + share.registered_commands
for _command in app.registered_commands:
    assert _command.callback
    _command.epilog = epilog(_command.name or _command.callback.__name__)
