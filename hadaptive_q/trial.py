"""The main job on a tiny network with random weights: whether it can be quantized, lowered and run here.

    python -m hadaptive_q.trial

prints one line of JSON: the file's `bytes`, and on how many `images` its logits and the integer interpreter's are
`identical`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from hadaptive_q.lower.executorch import lower
from hadaptive_q.lower.runtime import PteFile
from hadaptive_q.models.config import Preprocess
from hadaptive_q.models.families import create_model
from hadaptive_q.quant.backends import torchao_pt2e as backend
from hadaptive_q.quant.interpreter import IntegerProgram
from hadaptive_q.quant.plan import make_plan
from hadaptive_q.recipe import QuantizeConfig
from hadaptive_q.rewrite.deploy import deploy_graph

MODEL, CLASSES, IMAGE_SIZE, IMAGES = "hadaptive_net_nano", 10, 32, 8


def run_trial() -> dict[str, int]:
    """Quantize, lower and run the network; return `bytes`, `images` and how many are `identical`."""
    torch.manual_seed(0)
    model = create_model(MODEL, CLASSES)
    inputs = torch.randn(IMAGES, 3, IMAGE_SIZE, IMAGE_SIZE)
    with torch.no_grad():
        model.train()(inputs)  # running statistics to fold
    graph = deploy_graph(model.eval(), IMAGE_SIZE)
    prepared = backend.prepare(graph, make_plan(graph, QuantizeConfig()), "minmax")
    classes = tuple(map(str, range(CLASSES)))
    preprocess = Preprocess(image_size=IMAGE_SIZE, mean=(0.5,) * 3, std=(0.5,) * 3, classes=classes)
    program = backend.convert(backend.calibrate(prepared, [inputs]), preprocess)
    written = lower(program.export()).data
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pte"
        path.write_bytes(written)
        file = PteFile(path)
        logits = torch.cat([file(image[None]) for image in inputs])
    same = (logits == IntegerProgram(program)(inputs)).all(dim=1)
    return {"bytes": len(written), "images": IMAGES, "identical": int(same.sum())}


if __name__ == "__main__":
    print(json.dumps(run_trial()))
