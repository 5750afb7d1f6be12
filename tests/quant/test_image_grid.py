"""The grid of an image of bytes stands before any image is seen, and nothing moves it."""

from __future__ import annotations

import pytest
import torch
from torch.fx import GraphModule

from hadaptive_q.models.families import create_model
from hadaptive_q.quant.backends import torchao_pt2e as backend
from hadaptive_q.quant.fake_quant import ActivationFakeQuantize
from hadaptive_q.quant.image_grid import PIXEL_RANGE, VIEWS
from hadaptive_q.quant.plan import make_plan
from hadaptive_q.quant.sites import quantizer_of
from hadaptive_q.recipe import QuantizeConfig
from hadaptive_q.rewrite.deploy import deploy_graph

BYTES = torch.arange(256)


def test_one_tensor_has_the_range_of_pixels(nano_graph: GraphModule) -> None:
    assert make_plan(nano_graph, QuantizeConfig()).ranges == {}
    plan = make_plan(nano_graph, QuantizeConfig(input="uint8"))
    assert plan == make_plan(nano_graph, QuantizeConfig(input="uint8_nchw"))
    ((name, limits),) = plan.ranges.items()
    assert limits == PIXEL_RANGE
    assert name in plan.activations
    assert name not in plan.shared
    node = next(node for node in nano_graph.graph.nodes if node.name == name)
    while node.op != "placeholder":  # the image as it is, or rearranged
        assert node.target in VIEWS
        node = node.args[0]


def test_an_image_that_nothing_rearranges() -> None:
    torch.manual_seed(0)
    graph = deploy_graph(create_model("hadaptive_net_nano", 10).eval(), 33)  # odd: no whole patches
    ((name, _),) = make_plan(graph, QuantizeConfig(input="uint8")).ranges.items()
    assert next(node for node in graph.graph.nodes if node.name == name).op == "placeholder"


@pytest.mark.parametrize("observer", ["minmax", "histogram"])
def test_every_byte_is_a_code_in_every_phase(observer: str) -> None:
    quantizer = ActivationFakeQuantize(observer=observer, known=PIXEL_RANGE)  # type: ignore[arg-type]
    quantizer(torch.full((4,), 0.3))  # images that are not as bright as images get
    quantizer.fix()
    pixels = (BYTES / 255).requires_grad_()
    for step in ("fixed", "following", "learning"):
        quantizer.follow = step == "following"
        quantizer.learn(step == "learning")
        out = quantizer(pixels * 0.9)
        out.sum().backward()
        assert not quantizer.scale.requires_grad
        assert quantizer.scale.grad is None
        scale, zero_point = quantizer.calculate_qparams()
        assert scale.tolist() == [float(torch.tensor(1 / 255))]
        assert zero_point.tolist() == [-128]
        codes = torch.ops.quantized_decomposed.quantize_per_tensor(
            BYTES / 255, float(scale), -128, -128, 127, torch.int8
        )
        assert torch.equal(codes, (BYTES - 128).to(torch.int8))


def test_calibration_with_dark_images_keeps_it(nano_graph: GraphModule) -> None:
    plan = make_plan(nano_graph, QuantizeConfig(input="uint8"))
    (name,) = plan.ranges
    dark = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.2
    calibrated = backend.calibrate(backend.prepare(nano_graph, plan, "histogram"), [dark])
    quantizer = quantizer_of(calibrated.graph, name)
    assert (float(quantizer.scale), int(quantizer.zero_point)) == (float(torch.tensor(1 / 255)), -128)
