"""Search for mixed precision: which layers can do with 4 bits, by what each of them does to the logits.

No training: the float network is calibrated with 8-bit weights, every layer's noise in 4 bits is measured alone
(`quant.sensitivity`), and a knapsack picks the layers for a size (`quant.assignment`). The choice is then prepared,
calibrated and lowered as its recipe says, and what is promised of it is measured on that. What bits cost in
instructions is counted on an emulated core, where this machine has the emulator.
"""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from hadaptive_q import atomic
from hadaptive_q.arm.build import missing
from hadaptive_q.arm.count import count_instructions
from hadaptive_q.data.calibration import Manifest, batches, find_manifest, resolve
from hadaptive_q.data.datasets import ImageData, TensorSplit, spread
from hadaptive_q.errors import UserError
from hadaptive_q.lower.executorch import lower
from hadaptive_q.lower.layer_costs import instructions_added
from hadaptive_q.lower.parity import top1
from hadaptive_q.models.checkpoint import load_model
from hadaptive_q.models.config import MODELS, HadaptiveNetConfig
from hadaptive_q.models.network import Network
from hadaptive_q.pipeline import calibrate, on_file_inputs, open_data_for, prepare, weights_digest
from hadaptive_q.quant.assignment import choose
from hadaptive_q.quant.backends import torchao_pt2e
from hadaptive_q.quant.plan import exceptions
from hadaptive_q.quant.program import QuantizedProgram
from hadaptive_q.quant.sensitivity import FourBitLayer, find_layers, in_four_bits, joint_noise, measure_sensitivity
from hadaptive_q.recipe import Recipe
from hadaptive_q.report.plots import pareto_png
from hadaptive_q.report.record import versions
from hadaptive_q.report.search_record import FrontPoint, Instructions, SearchedLayer, SearchRecord
from hadaptive_q.rewrite.deploy import deploy_graph
from hadaptive_q.rewrite.equalise_multiplications import equalise_multiplications
from hadaptive_q.rewrite.freeze_selection import freeze_selection
from hadaptive_q.train.loop import predict

STEPS = 24
# So many choices of the front, spread over it, get their accuracy measured where the goal does not ask for it.
MEASURED = 5


@dataclass(frozen=True)
class Goal:
    """`target_bytes`, the most the file may have, or `max_drop`, the most top-1 may lose against float, in points."""

    target_bytes: int | None = None
    max_drop: float | None = None


@dataclass(frozen=True)
class _Choice:
    """The layers in 4 bits, what is predicted of them, and the program made of them with its size."""

    layers: list[FourBitLayer]
    predicted_bytes: int
    program: QuantizedProgram
    pte: bytes

    @property
    def pte_bytes(self) -> int:
        return len(self.pte)

    @property
    def noise(self) -> float:
        return sum(layer.sensitivity for layer in self.layers)


@dataclass(frozen=True)
class _Costs:
    """Instructions on `core`: of the file with none and with all layers in 4 bits, and what each layer adds."""

    core: str
    int8: int
    smallest: int
    added: dict[str, int]

    def predicted(self, chosen: Sequence[FourBitLayer]) -> int:
        return self.int8 + sum(self.added[layer.layer] for layer in chosen)


@dataclass
class _Case:
    """What a search works with: the base recipe in 8 bits, its calibrated graph, images, layers, sizes and costs."""

    recipe: Recipe
    data: ImageData
    deploy: GraphModule
    calibrated: torchao_pt2e.Calibrated
    inputs: list[Tensor]
    val: TensorSplit
    layers: list[FourBitLayer] = field(default_factory=list)
    int8_bytes: int = 0
    costs: _Costs | None = None

    @property
    def smallest_bytes(self) -> int:
        return self.int8_bytes - sum(layer.bytes_saved for layer in self.layers)

    def top1(self, chosen: Sequence[FourBitLayer]) -> float:
        """Return top-1 of the calibrated graph with `chosen` in 4 bits."""
        with in_four_bits(self.calibrated.graph, chosen):
            return top1(*predict(self.calibrated.graph, self.val, self.data.preprocess))

    def least_noise(self, size: int) -> list[FourBitLayer]:
        """Return the layers for a file of at most `size` bytes, as predicted, with the least sum of noises."""
        sizes, noises = [layer.bytes_saved for layer in self.layers], [layer.sensitivity for layer in self.layers]
        taken = choose(sizes, noises, self.int8_bytes - max(size, self.smallest_bytes))
        assert taken is not None
        return [layer for layer, four in zip(self.layers, taken, strict=True) if four]

    def predicted(self, chosen: Sequence[FourBitLayer]) -> int:
        return self.int8_bytes - sum(layer.bytes_saved for layer in chosen)

    def mixed(self, chosen: Sequence[FourBitLayer]) -> Recipe:
        """Return the recipe with the bits of every layer that was measured, and of those that it had fixed."""
        layers = {layer.layer: 4 if layer in chosen else 8 for layer in self.layers}
        quantize = self.recipe.quantize.model_copy(update={"layers": self.recipe.quantize.layers | layers})
        return self.recipe.model_copy(update={"quantize": quantize})

    def make(self, chosen: list[FourBitLayer]) -> _Choice:
        """Prepare, calibrate, convert and lower the network with `chosen` in 4 bits."""
        calibrated = calibrate(self.mixed(chosen), copy.deepcopy(self.deploy), self.inputs)
        program = torchao_pt2e.convert(calibrated, self.data.preprocess, self.recipe.quantize.input)
        return _Choice(chosen, self.predicted(chosen), program, lower(program.export()).data)


def search(
    recipe: Recipe, checkpoint: Path, goal: Goal, out: Path, samples: int = 2048, core: str | None = None
) -> SearchRecord:
    """Choose bits for every layer of `checkpoint` and write `NAME.yaml`, `search.json` and `search.png` into `out`.

    `recipe` gives all but the bits of weights; what its own `quantize.layers` fixes stays. NAME is its name with
    ``_mixed``. Accuracy is that of `samples` validation images spread over the split: choosing by them, a limit on the
    drop holds for them. Instructions are those of `core`, where it is given and the emulator is there. Sensitivities
    and counts are kept in ``sensitivity.json`` and ``instructions.json``, and used again where checkpoint, calibration
    and number formats are the same.
    Raises UserError where no choice keeps the goal, and where the recipe leaves nothing to choose.
    """
    with atomic.output_folder(out):
        return _search(recipe, checkpoint, goal, out, samples, core)


def _search(recipe: Recipe, checkpoint: Path, goal: Goal, out: Path, samples: int, core: str | None) -> SearchRecord:
    model = load_model(checkpoint)
    data = open_data_for(recipe, model)
    manifest = resolve(find_manifest(recipe.calibration.manifest, data), data)
    digest = weights_digest(model)
    float_top1 = top1(*predict(model, _few(data, samples), data.preprocess))
    model.preprocess = data.preprocess
    case = _prepare(recipe, model, data, manifest, samples)
    key = _key(case.recipe, digest, manifest.digest or "", data)
    _measure(case, out / "sensitivity.json", key)
    absent = missing() if core else "no core was asked for"
    if core and not absent:
        case.costs = _costs(case, core, out / "instructions.json", key)

    int8_top1 = case.top1([])
    front = _front(case)
    if goal.target_bytes is not None:
        choice = _for_size(case, goal.target_bytes)
        wanted = spread(len(front) - 1, MEASURED)
        points = [_point(case, layers, case.top1(layers) if i in wanted else None) for i, layers in enumerate(front)]
        points[-1] = _point(case, front[-1], int8_top1)
    else:
        assert goal.max_drop is not None
        choice, points = _for_drop(case, goal.max_drop, float_top1, int8_top1, front)
    inputs = torch.cat(case.inputs)
    record = SearchRecord(
        model=model.config.name,
        data=data.name,
        checkpoint_digest=digest,
        calibration_digest=manifest.digest or "",
        calibration_images=len(inputs),
        samples=len(case.val),
        target_bytes=goal.target_bytes,
        max_drop=goal.max_drop,
        int8_bytes=case.int8_bytes,
        smallest_bytes=case.smallest_bytes,
        predicted_bytes=choice.predicted_bytes,
        pte_bytes=choice.pte_bytes,
        predicted_noise=choice.noise,
        joint_noise=joint_noise(case.calibrated.graph, choice.layers, inputs),
        program_noise=_program_noise(case, choice.program),
        float_top1=float_top1,
        int8_top1=int8_top1,
        top1=_top1(case, choice.program),
        instructions=_instructions(case, choice),
        instructions_absent=absent,
        layers=[_searched(case, layer, choice.layers) for layer in case.layers],
        front=points,
    )
    written = case.mixed(choice.layers)
    atomic.write_text(recipe_file(recipe, out), written.to_yaml())
    atomic.write_bytes(out / "search.png", pareto_png(record))
    atomic.write_text(out / "search.json", record.model_dump_json(indent=1) + "\n")
    return record


def recipe_file(recipe: Recipe, out: Path) -> Path:
    """Return where a search that starts from `recipe` writes the recipe it found."""
    return out / f"{_mixed(recipe)}.yaml"


def _mixed(recipe: Recipe) -> str:
    return f"{recipe.name.removesuffix('_mixed')}_mixed"


def _prepare(recipe: Recipe, model: Network, data: ImageData, manifest: Manifest, samples: int) -> _Case:
    bits = recipe.quantize.model_copy(update={"pointwise_weight_bits": 8})
    variant = model.config.name if model.config.name in MODELS else recipe.model
    own: dict[str, object] = {"name": _mixed(recipe), "model": variant}
    if isinstance(model.config, HadaptiveNetConfig):
        own["slot_order"] = model.config.slot_order
    recipe = recipe.model_copy(update={**own, "quantize": bits})
    preprocess, model = on_file_inputs(recipe, data.preprocess, model)
    data = replace(data, preprocess=preprocess)
    inputs = list(batches(manifest, data, recipe.calibration.batch_size))
    if recipe.quantize.selection == "static":
        freeze_selection(model, inputs)
    deploy = deploy_graph(model, data.preprocess.image_size)
    # Scales that follow the weights, whatever finds those of the recipe: bits change while it measures.
    graph = copy.deepcopy(deploy)
    if recipe.quantize.equalise:
        equalise_multiplications(graph, inputs)
    calibrated = torchao_pt2e.calibrate(prepare(recipe, graph), inputs)
    return _Case(recipe, data, deploy, calibrated, inputs, _few(data, samples))


def _few(data: ImageData, samples: int) -> TensorSplit:
    items = [data.val[i] for i in spread(len(data.val), samples)]
    images, labels = torch.stack([image for image, _ in items]), [int(label) for _, label in items]
    return TensorSplit(images, labels, [b""] * len(items))


def _key(recipe: Recipe, checkpoint: str, calibration: str, data: ImageData) -> str:
    formats = recipe.quantize.model_dump(mode="json")
    parts = [checkpoint, calibration, formats, data.preprocess.model_dump(mode="json"), versions()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _measure(case: _Case, cache: Path, key: str) -> None:
    """Fill in the layers with their sensitivities and the size of the int8 file, from `cache` where its key fits."""

    def measured() -> dict[str, Any]:
        fixed = exceptions(case.deploy, case.recipe.quantize.layers)
        free = [layer for layer in find_layers(case.deploy) if fixed.keys().isdisjoint(layer.nodes)]
        case.layers = measure_sensitivity(case.calibrated.graph, free, torch.cat(case.inputs))
        if not case.layers:
            raise UserError(
                "quantize.layers", "bits for every layer that can have 4", "some left to choose", "remove some of them"
            )
        return {"int8_bytes": case.make([]).pte_bytes, "layers": [asdict(layer) for layer in case.layers]}

    kept = _kept(cache, key, measured)
    case.layers = [FourBitLayer(**{**layer, "nodes": tuple(layer["nodes"])}) for layer in kept["layers"]]
    case.int8_bytes = kept["int8_bytes"]


def _costs(case: _Case, core: str, cache: Path, key: str) -> _Costs:
    """Return what bits cost on `core`, from `cache` where its key fits: by the files with none and all in 4 bits."""

    def measured() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            eight, four = Path(folder) / "8.pte", Path(folder) / "4.pte"
            eight.write_bytes(case.make([]).pte)
            four.write_bytes(case.make(case.layers).pte)
            each = iter(instructions_added(eight, four, core))
            # Layers and operators are both in the order of the data.
            added = {layer.layer: sum(next(each) for _ in layer.nodes) for layer in case.layers}
            totals = {"int8": count_instructions(eight, core).total, "smallest": count_instructions(four, core).total}
            return {**totals, "added": added}

    kept = _kept(cache, f"{key} {core}", measured)
    return _Costs(core, kept["int8"], kept["smallest"], kept["added"])


def _instructions(case: _Case, choice: _Choice) -> Instructions | None:
    costs = case.costs
    if costs is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chosen.pte"
        path.write_bytes(choice.pte)
        counted = count_instructions(path, costs.core).total
    return Instructions(
        core=costs.core,
        int8=costs.int8,
        smallest=costs.smallest,
        predicted=costs.predicted(choice.layers),
        chosen=counted,
    )


def _kept(path: Path, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `path` holds under `key`, or what `measure` returns, which is then written there."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        kept = None
    if isinstance(kept, dict) and kept.get("key") == key:
        return kept
    content = {"key": key, **measure()}
    atomic.write_text(path, json.dumps(content, indent=1) + "\n")
    return content


def _front(case: _Case) -> list[list[FourBitLayer]]:
    """Return the choices of least noise for a ladder of sizes, the smallest file first, each once."""
    least, span = case.smallest_bytes, case.int8_bytes - case.smallest_bytes
    choices = [case.least_noise(least + span * step // STEPS) for step in range(STEPS + 1)]
    return [choice for i, choice in enumerate(choices) if choice not in choices[:i]]


def _point(case: _Case, chosen: Sequence[FourBitLayer], accuracy: float | None = None) -> FrontPoint:
    noise = sum(layer.sensitivity for layer in chosen)
    return FrontPoint(
        pte_bytes=case.predicted(chosen),
        noise=noise,
        four_bit_layers=len(chosen),
        top1=accuracy,
        instructions=case.costs.predicted(chosen) if case.costs else None,
    )


def _for_size(case: _Case, target: int) -> _Choice:
    """Return the choice of least noise whose file, lowered, has at most `target` bytes."""
    wanted = target
    while wanted >= case.smallest_bytes:
        choice = case.make(case.least_noise(wanted))
        if choice.pte_bytes <= target:
            return choice
        # What alignment adds is not predicted: ask for that much less.
        wanted -= choice.pte_bytes - target
    raise UserError(
        f"--target-size {target:,} bytes",
        "a size that 4-bit weights cannot reach",
        f"{case.smallest_bytes:,} bytes (all layers that can in 4 bits) to {case.int8_bytes:,} (none)",
    )


def _for_drop(
    case: _Case, limit: float, float_top1: float, int8_top1: float, front: list[list[FourBitLayer]]
) -> tuple[_Choice, list[FrontPoint]]:
    """Return the smallest choice of the front that loses at most `limit` points, and the front as far as measured."""
    points = [_point(case, layers) for layers in front]
    for index, layers in enumerate(front):
        accuracy = case.top1(layers)
        points[index] = _point(case, layers, accuracy)
        if float_top1 - accuracy <= limit:
            choice = case.make(layers)
            # The graph had the ranges of 8-bit weights; what counts is the program with its own.
            if float_top1 - _top1(case, choice.program) <= limit:
                return choice, points
    raise UserError(
        f"--max-drop {limit}",
        f"a drop of {float_top1 - int8_top1:.2f} points with 8 bits everywhere ({case.int8_bytes:,} bytes)",
        "a larger drop, which some choice keeps",
        "raise it, or train under quantization: --target-size, then hadaptive-q qat",
    )


def _top1(case: _Case, program: QuantizedProgram) -> float:
    return top1(*predict(program.graph, case.val, program.preprocess))


@torch.no_grad()
def _program_noise(case: _Case, program: QuantizedProgram) -> float:
    noise = power = 0.0
    for inputs in case.inputs:
        wanted = case.calibrated.graph(inputs).double()
        noise += float((wanted - program(inputs).double()).square().sum())
        power += float(wanted.square().sum())
    return noise / power


def _searched(case: _Case, layer: FourBitLayer, chosen: Sequence[FourBitLayer]) -> SearchedLayer:
    return SearchedLayer(
        layer=layer.layer,
        weights=layer.weights,
        bytes_saved=layer.bytes_saved,
        sensitivity=layer.sensitivity,
        instructions_added=case.costs.added[layer.layer] if case.costs else None,
        bits=4 if layer in chosen else 8,
    )
