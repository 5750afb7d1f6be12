"""The files that cost is measured on: a network with random weights, ours and as the stock tools lower it.

What an inference costs does not depend on weights or inputs.
"""

from __future__ import annotations

import torch
from stock import stock_float, stock_int8
from torch import Tensor
from torch.fx import GraphModule

from hadaptive_q.lower.executorch import Lowered, lower
from hadaptive_q.models.config import Preprocess
from hadaptive_q.models.hadaptive_net import HadaptiveNet, create_model
from hadaptive_q.quant.backends import torchao_pt2e as backend
from hadaptive_q.quant.plan import make_plan
from hadaptive_q.quant.program import export_graph
from hadaptive_q.recipe import QuantizeConfig
from hadaptive_q.rewrite.deploy import deploy_graph
from hadaptive_q.rewrite.drop_no_ops import drop_no_ops

CLASSES, BATCH = 100, 4
FORMS = ("stock float", "float", "stock int8", "int8")


def random_model(name: str, image_size: int) -> tuple[HadaptiveNet, Tensor]:
    """Return a network and the batch that its running statistics come from."""
    torch.manual_seed(0)
    model = create_model(name, CLASSES)
    inputs = torch.randn(BATCH, 3, image_size, image_size)
    with torch.no_grad():
        model.train()(inputs)
    return model.eval(), inputs


def make_file(form: str, model: HadaptiveNet, inputs: Tensor) -> bytes:
    """Return the bytes of one of `FORMS`."""
    size = inputs.shape[-1]
    if form == "stock float":
        return stock_float(model, size)
    if form == "stock int8":
        return stock_int8(model, [inputs], size)[1]
    graph = deploy_graph(model, size)
    if form == "int8":
        return lower_int8(graph, inputs).data
    drop_no_ops(graph)
    return lower(export_graph(graph, size)).data


def lower_int8(graph: GraphModule, inputs: Tensor) -> Lowered:
    """Quantize the deploy graph `graph` on one batch and lower it."""
    prepared = backend.prepare(graph, make_plan(graph, QuantizeConfig()), "minmax")
    classes = tuple(str(label) for label in range(CLASSES))
    preprocess = Preprocess(image_size=inputs.shape[-1], mean=(0.5,) * 3, std=(0.5,) * 3, classes=classes)
    return lower(backend.convert(backend.calibrate(prepared, [inputs]), preprocess).export())
