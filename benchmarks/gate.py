"""What the gate catches and what it lets pass: regressions seeded into the pipeline, and honest repetitions.

    python benchmarks/gate.py

The nano network on digits, int8 after training. The baseline is the run of seed 0. Honest repetitions train the float
network with another seed, or calibrate on other images; every seeded regression is one fault in a run that is otherwise
the baseline's. All are held against the default budgets. A run that is already in the output folder is not repeated.
Writes benchmarks/results/gate.json and the tables in docs/gate.md.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rows import ROOT, Row, markdown, read_results, write_results, write_table
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from hadaptive_q import pipeline
from hadaptive_q.atomic import write_text
from hadaptive_q.data.calibration import DEFAULT_COUNT, Manifest
from hadaptive_q.lower import executorch
from hadaptive_q.lower.executorch import Lowered
from hadaptive_q.quant.backends import torchao_pt2e as backend
from hadaptive_q.quant.plan import Plan
from hadaptive_q.quant.program import QuantizedProgram
from hadaptive_q.recipe import load_recipe
from hadaptive_q.regress import DEFAULTS, hold, parse_budgets
from hadaptive_q.rewrite.graph import add_parameter, aten, constant, finish, module_path
from hadaptive_q.rewrite.products import find_products
from hadaptive_q.rewrite.select_by_rank import BIG

PAGE = ROOT / "docs" / "gate.md"
FLOATS, SUBSETS = 11, 9
BASE = "float-training-seed-0"
LAYER = "blocks.1.projection.conv"

Fault = AbstractContextManager[Any]


def after(owner: object, name: str, change: Callable[..., Any]) -> Fault:
    """Replace `name` of `owner` by itself with `change` behind it: it gets the result and the arguments."""
    original = getattr(owner, name)
    return patch.object(owner, name, lambda *arguments: change(original(*arguments), *arguments))


def scale_in_lowering() -> Fault:
    def change(program: ExportedProgram, *_: object) -> ExportedProgram:
        (conv,) = (node for node in program.graph.nodes if node.target == aten.conv2d.default and in_layer(node))
        (quantize,) = conv.users
        for node in (quantize, *quantize.users):
            node.args = (node.args[0], 1.01 * node.args[1], *node.args[2:])
        return program

    return after(QuantizedProgram, "export", change)


def scale_of_weights() -> Fault:
    def change(program: QuantizedProgram, *_: object) -> QuantizedProgram:
        weight = layer_of(program.graph).args[1]
        assert isinstance(weight, Node)
        tensor(program.graph, weight.args[1]).mul_(1.01)
        return program

    return after(pipeline, "quantized_program", change)


def scale_of_codes() -> Fault:
    def change(program: QuantizedProgram, *_: object) -> QuantizedProgram:
        (quantize,) = layer_of(program.graph).users
        for node in list(quantize.users):
            node.args = (node.args[0], 1.01 * node.args[1], *node.args[2:])  # type: ignore[operator]
        return program

    return after(pipeline, "quantized_program", change)


def shared_scale() -> Fault:
    def change(plan: Plan, graph: GraphModule, *_: object) -> Plan:
        plan.shared.update({product.normed: product.mixed for product in find_products(graph)})
        return plan

    return after(pipeline, "make_plan", change)


def int8_selection() -> Fault:
    def change(plan: Plan, graph: GraphModule, *_: object) -> Plan:
        form = next(iter(plan.activations.values()))
        scaled = [n for n in graph.graph.nodes if n.target == aten.mul.Tensor and n.args[1] == BIG]
        plan.activations.update({node.args[0].name: form for node in scaled})
        return plan

    return after(pipeline, "make_plan", change)


def dropped_bias() -> Fault:
    def change(calibrated: backend.Calibrated, *_: object) -> backend.Calibrated:
        tensor(calibrated.graph, layer_of(calibrated.graph).args[2]).zero_()
        return calibrated

    return after(backend, "calibrate", change)


def float_layer() -> Fault:
    def change(program: QuantizedProgram, *_: object) -> QuantizedProgram:
        conv = layer_of(program.graph)
        source, weight, *rest = conv.args
        assert isinstance(weight, Node)
        codes, scales = (tensor(program.graph, argument) for argument in weight.args[:2])
        values = codes * scales.reshape(-1, *[1] * (codes.dim() - 1))
        conv.args = (source, add_parameter(program.graph, "in_float", values.float(), conv), *rest)
        finish(program.graph)
        return program

    return after(pipeline, "quantized_program", change)


def outside_the_delegate() -> Fault:
    kept = [config for config in executorch._CONFIGS if config.target_name != "hardswish.default"]
    return patch.object(executorch, "_CONFIGS", kept)


def larger_file() -> Fault:
    def change(lowered: Lowered, program: ExportedProgram) -> Lowered:
        return replace(lowered, data=lowered.data + bytes(len(lowered.data) // 10)) if quantized(program) else lowered

    return after(pipeline, "lower", change)


FAULTS: dict[str, Callable[[], Fault]] = {
    "scale of an activation off by 1 % in lowering": scale_in_lowering,
    "scale of a layer's weights off by 1 % in the program": scale_of_weights,
    "codes of an activation read with a scale off by 1 %": scale_of_codes,
    "products on the scale of X~": shared_scale,
    "selection computed in int8": int8_selection,
    "bias of a layer dropped": dropped_bias,
    "a layer in fp32": float_layer,
    "hardswish outside the delegate": outside_the_delegate,
    "a file 10 % larger": larger_file,
}


def layer_of(graph: GraphModule) -> Node:
    (found,) = (node for node in graph.graph.nodes if node.target == aten.conv2d.default and in_layer(node))
    assert isinstance(found, Node)
    return found


def in_layer(node: Node) -> bool:
    return module_path(node) == LAYER


def tensor(graph: GraphModule, node: object) -> Tensor:
    found = constant(graph, node)
    assert found is not None
    return found.data


def quantized(program: ExportedProgram) -> bool:
    return any("quantize_per_tensor" in str(node.target) for node in program.graph.nodes)


def honest(out: Path) -> dict[str, tuple[list[str], Path | None]]:
    """Return the honest repetitions by title: what their recipes change, and the float model they start from."""
    runs: dict[str, tuple[list[str], Path | None]] = {
        f"float training, seed {seed}": ([f"seed={seed}"], None) for seed in range(1, FLOATS + 1)
    }
    for seed in range(1, SUBSETS + 1):
        path = out / f"calibration-{seed}.yaml"
        write_text(path, Manifest(source="digits", count=DEFAULT_COUNT, seed=seed).to_yaml())
        runs[f"calibration, subset {seed}"] = ([f"calibration.manifest={path}"], out / BASE / "float.safetensors")
    return runs


def run(folder: Path, settings: list[str], checkpoint: Path | None, fault: Fault) -> None:
    """Run the recipe into `folder` with `fault` in the pipeline, unless it already was."""
    recipe = load_recipe("int8_ptq", ["model=hadaptive_net_nano", "image_size=32", *settings])
    if not (folder / "report.json").is_file():
        with floats_lowered_once(), fault:
            pipeline.quantize(recipe, folder, checkpoint)


FLOAT_FILES: dict[str, Lowered] = {}


def floats_lowered_once() -> Fault:
    """Lower float networks of equal weights once: most runs here start from the same."""
    original = executorch.lower

    def lower(program: ExportedProgram) -> Lowered:
        if quantized(program):
            return original(program)
        key = pipeline.weights_digest(program.module())
        if key not in FLOAT_FILES:
            FLOAT_FILES[key] = original(program)
        return FLOAT_FILES[key]

    return patch.object(pipeline, "lower", lower)


def _rows(out: Path, only: list[str]) -> list[Row]:
    out.mkdir(parents=True, exist_ok=True)
    run(out / BASE, [], None, nullcontext())
    hold(out / BASE, [], out / "gate.json", update=True)
    rows: list[Row] = []

    def add(kind: str, title: str, settings: list[str], checkpoint: Path | None, fault: Fault) -> None:
        if only and not any(text in title for text in only):
            return
        folder = out / re.sub(r"\W+", "-", title)
        run(folder, settings, checkpoint, fault)
        rows.append({"kind": kind, "title": title, **_outcome(folder, out / "gate.json")})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)

    for title, make in FAULTS.items():
        add("fault", title, [], out / BASE / "float.safetensors", make())
    for title, (settings, checkpoint) in honest(out).items():
        add("honest", title, settings, checkpoint, nullcontext())
    return rows


def _outcome(folder: Path, baseline: Path) -> Row:
    outcome = hold(folder, [], baseline)
    return {
        "figures": {held.key: held.figure for held in outcome.held},
        "broken": [held.key for held in outcome.broken],
        "undecided": [held.key for held in outcome.held if held.verdict == "undecided"],
        "guilty": outcome.guilty,
    }


def _caught(rows: list[Row]) -> str:
    lines = [_caught_line(row) for row in rows if row["kind"] == "fault"]
    honest_rows = [row for row in rows if row["kind"] == "honest"]
    passed = sum(not row["broken"] for row in honest_rows)
    summary = f"{passed} of {len(honest_rows)} honest repetitions pass."
    return f"{markdown(('seeded regression', 'gate', 'broken budgets', 'first of the guilty'), lines)}\n\n{summary}"


def _caught_line(row: Row) -> tuple[str, ...]:
    broken = ", ".join(f"`{key}` {row['figures'][key]:.4g}" for key in row["broken"])
    return row["title"], "fails" if broken else "**passes**", broken, row["guilty"][0] if row["guilty"] else ""


def _spread(rows: list[Row]) -> str:
    kinds = {"float training": "other float trainings", "calibration": "other calibration images"}
    lines = []
    for budget in parse_budgets(DEFAULTS):
        cells = []
        for kind in kinds:
            found = [row["figures"][budget.key] for row in rows if row["title"].startswith(f"{kind},")]
            cells.append(f"{min(found):.4g} to {max(found):.4g}" if found else "")
        lines.append((f"`{budget.text}`", *cells))
    return markdown(("default budget", *kinds.values()), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gate")
    parser.add_argument("--only", action="append", default=[], help="only the runs whose titles hold this; repeatable")
    parser.add_argument("--render", action="store_true", help="only write the tables from the results")
    arguments = parser.parse_args()
    if not arguments.render:
        write_results("gate", _rows(arguments.out, arguments.only))
    rows = read_results("gate")
    write_table("caught", _caught(rows), PAGE)
    write_table("spread", _spread(rows), PAGE)


if __name__ == "__main__":
    main()
