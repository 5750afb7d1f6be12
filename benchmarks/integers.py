"""Written files against the integer interpreter of their programs: images whose codes are all the same.

    python benchmarks/integers.py RUN [RUN ...] --images 5000 --core cortex-a76

RUN is a folder that `hadaptive-q qat` or `ptq` wrote. "program" is the converted graph in float32 arithmetic. Without
--core the file runs in the runtime of this machine.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors.torch import load_model as load_tensors
from torch import Tensor

from hadaptive_q.arm.count import run_on
from hadaptive_q.data.sources import open_data
from hadaptive_q.data.transforms import normalise
from hadaptive_q.lower.runtime import PteFile
from hadaptive_q.models.checkpoint import load_model
from hadaptive_q.quant.backends import torchao_pt2e as backend
from hadaptive_q.quant.fake_quant import ActivationFakeQuantize
from hadaptive_q.quant.interpreter import IntegerProgram
from hadaptive_q.quant.plan import make_plan
from hadaptive_q.quant.program import QuantizedProgram
from hadaptive_q.recipe import Recipe, read_yaml
from hadaptive_q.rewrite.deploy import deploy_graph

BATCH = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--core")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| run | images | interpreter, same codes | program, same codes | interpreter, s per 128 images |")
    print("| --- | --- | --- | --- | --- |")
    for run in arguments.runs:
        recipe = Recipe.model_validate(read_yaml(run / "recipe.yaml"))
        program = read_program(run, recipe)
        data = open_data(recipe.data, program.preprocess.image_size)
        count = min(arguments.images, len(data.val))
        chosen = [data.val[i * len(data.val) // count][0] for i in range(count)]
        inputs = normalise(torch.stack(chosen), program.preprocess)
        wanted = run_file(run / "model.pte", inputs, arguments.core)
        integers = IntegerProgram(program)
        begin = time.perf_counter()
        found = torch.cat([integers(batch) for batch in inputs.split(BATCH)])
        seconds = (time.perf_counter() - begin) / count * BATCH
        simulated = torch.cat([program(batch) for batch in inputs.split(BATCH)])
        same, nearly = (same_images(logits, wanted, integers.output_grid.scale) for logits in (found, simulated))
        print(f"| {run.name} | {count} | {same} | {nearly} | {seconds:.2f} |", flush=True)


def read_program(run: Path, recipe: Recipe) -> QuantizedProgram:
    """Return the quantized program of a finished run."""
    model = load_model(run / "float.safetensors").eval()
    assert model.preprocess is not None
    if recipe.quantize.selection == "static":
        frozen = json.loads((run / "selection.json").read_text())
        for name, ach in model.ach_modules():
            ach.freeze(torch.tensor(frozen[name]))
    size = model.preprocess.image_size
    graph = deploy_graph(model, size)
    prepared = backend.prepare(graph, make_plan(graph, recipe.quantize), recipe.quantize.observer)
    with torch.no_grad():
        prepared.graph(torch.zeros(2, 3, size, size))  # gives the scales of weights the shapes they were saved with
    load_tensors(prepared.graph, run / "quantized.safetensors")
    for module in prepared.graph.modules():
        if isinstance(module, ActivationFakeQuantize):
            module.disable_observer()
            module.enable_fake_quant()
    return backend.convert(backend.Calibrated(prepared.graph, prepared.plan), model.preprocess)


def run_file(path: Path, inputs: Tensor, core: str | None) -> Tensor:
    if core:
        return torch.from_numpy(run_on(path, core, inputs))
    file = PteFile(path)
    return torch.cat([file(image[None]) for image in inputs])


def same_images(logits: Tensor, wanted: Tensor, scale: float) -> int:
    codes = ((logits - wanted) / scale).round()
    return int((codes == 0).all(dim=1).sum())


if __name__ == "__main__":
    main()
