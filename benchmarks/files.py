"""The files that cost is measured on: a network with random weights, ours and as the stock tools lower it.

What an inference costs does not depend on weights or inputs.
"""

from __future__ import annotations

import copy

import torch
from stock import stock_float, stock_int8
from torch import Tensor
from torch.fx import GraphModule

from hadaptive_q.lower.executorch import Lowered, lower
from hadaptive_q.models.config import Preprocess
from hadaptive_q.models.families import create_model
from hadaptive_q.models.network import Network
from hadaptive_q.models.pixels import take_pixels
from hadaptive_q.quant.backends import torchao_pt2e as backend
from hadaptive_q.quant.plan import make_plan
from hadaptive_q.quant.program import QuantizedProgram, export_graph
from hadaptive_q.recipe import QuantizeConfig
from hadaptive_q.rewrite.deploy import deploy_graph
from hadaptive_q.rewrite.drop_no_ops import drop_no_ops
from hadaptive_q.rewrite.freeze_selection import freeze_selection

CLASSES, BATCH = 100, 4
# What differs from the default recipe; the stock forms and our float form have none.
QUANTIZED = {
    "int8": QuantizeConfig(),
    "int8, uint8 NHWC": QuantizeConfig(input="uint8"),
    "int8, uint8 NCHW": QuantizeConfig(input="uint8_nchw"),
    "int8, static selection": QuantizeConfig(selection="static"),
    "int4": QuantizeConfig(pointwise_weight_bits=4),
}
FORMS = ("stock float", "float", "stock int8", *QUANTIZED)


def random_model(name: str, image_size: int) -> tuple[Network, Tensor]:
    """Return a network and the batch that its running statistics come from."""
    torch.manual_seed(0)
    model = create_model(name, CLASSES)
    inputs = torch.randn(BATCH, 3, image_size, image_size)
    with torch.no_grad():
        model.train()(inputs)
    return model.eval(), inputs


def make_file(form: str, model: Network, inputs: Tensor) -> bytes:
    """Return the bytes of one of `FORMS`."""
    size = inputs.shape[-1]
    if form == "stock float":
        return stock_float(model, size)
    if form == "stock int8":
        return stock_int8(model, [inputs], size)[1]
    if form in QUANTIZED:
        return lower(make_program(form, model, inputs).export()).data
    graph = deploy_graph(model, size)
    drop_no_ops(graph)
    return lower(export_graph(graph, size)).data


def make_program(form: str, model: Network, inputs: Tensor) -> QuantizedProgram:
    """Return the program of one of `QUANTIZED`, calibrated on one batch."""
    config = QUANTIZED[form]
    model = copy.deepcopy(model)
    if config.input != "float32":
        model, inputs = take_pixels(model, preprocess_of(inputs.shape[-1])), ((inputs + 4) / 8).clamp(0, 1)
    if config.selection == "static":
        freeze_selection(model, [inputs])
    return _program(deploy_graph(model, inputs.shape[-1]), inputs, config)


def lower_int8(graph: GraphModule, inputs: Tensor) -> Lowered:
    """Quantize the deploy graph `graph` on one batch and lower it."""
    return lower(_program(graph, inputs, QuantizeConfig()).export())


def _program(graph: GraphModule, inputs: Tensor, config: QuantizeConfig) -> QuantizedProgram:
    prepared = backend.prepare(graph, make_plan(graph, config), "minmax")
    return backend.convert(backend.calibrate(prepared, [inputs]), preprocess_of(inputs.shape[-1]), config.input)


def preprocess_of(image_size: int) -> Preprocess:
    """Return how the networks here see an image."""
    classes = tuple(str(label) for label in range(CLASSES))
    return Preprocess(image_size=image_size, mean=(0.5,) * 3, std=(0.5,) * 3, classes=classes)
