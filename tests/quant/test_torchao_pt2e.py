"""prepare -> calibrate -> (fit) -> convert on the nano network, asserting at every step.

The contract: what trains is what ships. The fake-quantized network in eval mode and the converted program give
the same logits, bit for bit.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.fx import GraphModule

from hadaptive_q.data.datasets import ImageData
from hadaptive_q.errors import UserError
from hadaptive_q.lower.parity import output_scale, sqnr_db
from hadaptive_q.models.hadaptive_net import HadaptiveNet
from hadaptive_q.quant.backends import torchao_pt2e as backend
from hadaptive_q.quant.fake_quant import ActivationFakeQuantize, PerChannelWeightFakeQuantize
from hadaptive_q.quant.formats import SMALLEST_SCALE
from hadaptive_q.quant.observers import ObserverName
from hadaptive_q.quant.plan import make_plan
from hadaptive_q.quant.program import QuantizedProgram
from hadaptive_q.recipe import FitConfig, QuantizeConfig
from hadaptive_q.rewrite.deploy import deploy_graph
from hadaptive_q.rewrite.graph import aten, calls, constant
from hadaptive_q.train.loop import Training, train

FIT = FitConfig(epochs=2, batch_size=32, lr=1e-3, precision="float32")  # three steps an epoch
Q = torch.ops.quantized_decomposed


def prepared(graph: GraphModule, observer: ObserverName = "minmax") -> backend.Prepared:
    return backend.prepare(graph, make_plan(graph, QuantizeConfig()), observer)


def calibrated(graph: GraphModule, inputs: Tensor, observer: ObserverName = "minmax") -> backend.Calibrated:
    return backend.calibrate(prepared(graph, observer), inputs.split(16))


def fit(ready: backend.Calibrated, data: ImageData, learned: bool, training: Training | None = None) -> None:
    """Train the fake-quantized network for a few steps, as the pipeline does, its ranges frozen for the last epoch."""

    def on_epoch(_: nn.Module, epoch: int) -> None:
        if epoch == 1:
            backend.freeze_ranges(ready)

    backend.start_fit(ready, learned)
    train(ready.graph, data, replace(training or Training(FIT, 0, "qat"), on_epoch=on_epoch))
    backend.end_fit(ready)


def simulated(ready: backend.Calibrated, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = ready.graph(inputs)
    return out


def assert_program_equals_simulation(ready: backend.Calibrated, inputs: Tensor, data: ImageData) -> QuantizedProgram:
    wanted = {batch: simulated(ready, inputs[:batch]) for batch in (1, 3, 32)}
    program = backend.convert(ready, data.preprocess)
    for batch, logits in wanted.items():
        assert logits.shape == (batch, 10)
        assert torch.equal(program(inputs[:batch]), logits), f"batch {batch}"
    # Not because everything is one code: the logits use a good part of them.
    codes = wanted[32] / output_scale(program.graph)
    assert float((codes - codes.round()).abs().max()) < 1e-3
    assert len(codes.round().unique()) > 100
    return program


def test_preparation_puts_a_quantizer_at_every_planned_tensor(
    nano: HadaptiveNet, nano_graph: GraphModule, inputs: Tensor
) -> None:
    plan = make_plan(nano_graph, QuantizeConfig())
    ready = backend.prepare(nano_graph, plan, "mse")
    activations = list(backend.activation_quantizers(ready.graph))
    weights = [m for m in ready.graph.modules() if isinstance(m, PerChannelWeightFakeQuantize)]
    assert len(weights) == len(plan.weights)
    # Tensors that share a scale share one quantizer.
    owners = {name for name in plan.activations if name not in plan.shared}
    assert len(activations) == len(owners)
    assert {q.observer.name for q in activations} == {"mse"}
    # Nothing is measured yet: activations pass unchanged, and weights are rounded to their codes already.
    with torch.no_grad():
        float_logits = nano(inputs)
    assert sqnr_db(float_logits, simulated(backend.Calibrated(ready.graph, plan), inputs)) > 15


@pytest.mark.parametrize("observer", typing.get_args(ObserverName))
def test_after_calibration_program_and_simulation_agree(
    observer: ObserverName, nano: HadaptiveNet, nano_graph: GraphModule, inputs: Tensor, few_digits: ImageData
) -> None:
    with torch.no_grad():
        float_logits = nano(inputs)
    ready = calibrated(nano_graph, inputs, observer)
    for quantizer in backend.activation_quantizers(ready.graph):
        assert not quantizer.observer_enabled[0]
        assert quantizer.fake_quant_enabled[0]
        scale, _ = quantizer.calculate_qparams()
        assert float(scale) >= SMALLEST_SCALE
    program = assert_program_equals_simulation(ready, inputs, few_digits)
    # An untrained network's selections flip at the slightest noise, so this only tells codes from garbage.
    assert sqnr_db(float_logits, program(inputs)) > 12


@pytest.mark.parametrize("learned", [True, False], ids=["learned", "following"])
def test_after_training_program_and_simulation_agree(
    learned: bool, nano_graph: GraphModule, inputs: Tensor, few_digits: ImageData
) -> None:
    ready = calibrated(nano_graph, inputs)
    quantizers = list(backend.activation_quantizers(ready.graph))
    scales = torch.cat([q.calculate_qparams()[0] for q in quantizers])
    weights = {n: p.detach().clone() for n, p in ready.graph.named_parameters()}
    before = simulated(ready, inputs)

    fit(ready, few_digits, learned)
    after = torch.cat([q.calculate_qparams()[0] for q in quantizers])
    # All but those of tensors that stay zero: most taps of a 7x7 kernel never meet a map of 2 x 2.
    assert float((scales != after).float().mean()) > 0.8
    assert any(not torch.equal(p.detach(), weights[n]) for n, p in ready.graph.named_parameters())
    assert not torch.equal(simulated(ready, inputs), before)
    assert not any(q.scale.requires_grad or q.follow for q in quantizers)
    assert_program_equals_simulation(ready, inputs, few_digits)


@pytest.mark.parametrize("weights", [True, False], ids=["learned", "kept"])
def test_scales_of_four_bits_are_learned_or_kept_and_ship(
    weights: bool, make_graph: Callable[..., GraphModule], inputs: Tensor, few_digits: ImageData, tmp_path: Path
) -> None:
    graph = make_graph(deploy_graph)
    plan = make_plan(graph, QuantizeConfig(pointwise_weight_bits=4))
    ready = backend.calibrate(backend.prepare(graph, plan, "minmax"), [inputs])
    small = {name for name, form in plan.weights.items() if form.bits == 4}

    def scales(graph: GraphModule) -> dict[str, Tensor]:
        nodes = [node for node in graph.graph.nodes if node.name in small]
        return {n.name: backend.weight_quantizer(graph, n).calculate_qparams()[0].clone() for n in nodes}

    before = scales(ready.graph)
    backend.start_fit(ready, learned=True, weights=weights)
    train(ready.graph, few_digits, Training(FIT, 0, "qat"))
    backend.end_fit(ready)
    after = scales(ready.graph)
    assert len(after) == len(small) > 4
    assert all(torch.equal(after[name], before[name]) != weights for name in small)
    assert not any(q.scale.requires_grad for q in ready.graph.modules() if isinstance(q, PerChannelWeightFakeQuantize))

    save_model(ready.graph, str(tmp_path / "state.safetensors"))
    again = backend.prepare(make_graph(deploy_graph), plan, "minmax")
    assert_program_equals_simulation(backend.restore(again, tmp_path / "state.safetensors"), inputs, few_digits)
    program = assert_program_equals_simulation(ready, inputs, few_digits)
    shipped = {
        next(iter(node.users)).name: constant(program.graph, node.args[1])
        for node in calls(program.graph, Q.dequantize_per_channel.default)
    }
    assert all(torch.equal(shipped[name], scale) for name, scale in after.items())  # type: ignore[arg-type]


@pytest.mark.parametrize("selection", ["channel", "static"])
def test_other_ways_to_fill_the_slots(
    selection: str, make_graph: Callable[..., GraphModule], inputs: Tensor, few_digits: ImageData
) -> None:
    graph = make_graph(deploy_graph, selection)
    with torch.no_grad():
        float_logits = graph(inputs)
    ready = calibrated(graph, inputs)
    fit(ready, few_digits, learned=True)
    program = assert_program_equals_simulation(ready, inputs, few_digits)
    if selection == "static":  # without choices there is nothing to flip: int8 is close to float, six steps away
        assert sqnr_db(float_logits, program(inputs)) > 12


def test_half_precision_training_leaves_the_contract(
    nano_graph: GraphModule, inputs: Tensor, few_digits: ImageData
) -> None:
    ready = calibrated(nano_graph, inputs)
    fit(ready, few_digits, True, Training(FIT.model_copy(update={"precision": "bf16"}), 0, "qat"))
    assert torch.equal(simulated(ready, inputs), simulated(ready, inputs)), "dropout is still active"
    assert_program_equals_simulation(ready, inputs, few_digits)


def test_frozen_ranges_stay_while_weights_train(nano_graph: GraphModule, inputs: Tensor, few_digits: ImageData) -> None:
    ready = calibrated(nano_graph, inputs)
    backend.start_fit(ready, learned=True)
    backend.freeze_ranges(ready)
    scales = [q.scale.detach().clone() for q in backend.activation_quantizers(ready.graph)]
    weight = dict(ready.graph.named_parameters())["head.classifier.weight"]
    before = weight.detach().clone()
    train(ready.graph, few_digits, Training(FIT, 0, "qat"))
    assert all(torch.equal(s, q.scale) for s, q in zip(scales, backend.activation_quantizers(ready.graph), strict=True))
    assert not torch.equal(weight, before)


def test_dropout_is_active_in_training_only_and_keeps_its_probability(
    nano_graph: GraphModule, inputs: Tensor, few_digits: ImageData
) -> None:
    ready = calibrated(nano_graph, inputs)
    (dropout,) = calls(ready.graph, aten.dropout.default)
    assert dropout.args[1:] == (0.3, False)
    backend.start_fit(ready, learned=False)
    assert dropout.args[1:] == (0.3, True)
    assert not torch.equal(simulated(ready, inputs), simulated(ready, inputs))
    backend.end_fit(ready)
    assert dropout.args[1:] == (0.3, False)
    assert torch.equal(simulated(ready, inputs), simulated(ready, inputs))
    program = backend.convert(ready, few_digits.preprocess)
    assert not list(calls(program.graph, aten.dropout.default))


def test_a_killed_fit_continues_to_the_same_program(
    make_graph: Callable[..., GraphModule], inputs: Tensor, few_digits: ImageData, tmp_path: Path
) -> None:
    class Killed(Exception):
        pass

    def start() -> backend.Calibrated:
        ready = calibrated(make_graph(deploy_graph), inputs)
        backend.start_fit(ready, learned=True)
        return ready

    def finish(ready: backend.Calibrated, training: Training) -> Tensor:
        train(ready.graph, few_digits, training)
        backend.end_fit(ready)
        return simulated(ready, inputs)

    def killed(_: nn.Module, epoch: int) -> None:
        if epoch == 1:
            raise Killed

    whole = finish(start(), Training(FIT, 0, "qat"))
    kept = Training(FIT, 0, "qat", tmp_path / "qat.state", "key")
    with pytest.raises(Killed):
        finish(start(), replace(kept, on_epoch=killed))
    assert torch.equal(finish(start(), kept), whole)


def test_the_program_holds_codes_and_one_dequantize_per_reader(
    nano_graph: GraphModule, inputs: Tensor, few_digits: ImageData
) -> None:
    ready = calibrated(nano_graph, inputs)
    scales = {float(q.calculate_qparams()[0]) for q in backend.activation_quantizers(ready.graph)}
    program = backend.convert(ready, few_digits.preprocess)
    assert not [m for m in program.graph.modules() if isinstance(m, ActivationFakeQuantize)]

    quantizes = list(calls(program.graph, Q.quantize_per_tensor.default))
    dequantizes = list(calls(program.graph, Q.dequantize_per_tensor.default))
    assert quantizes
    assert {node.args[1] for node in (*quantizes, *dequantizes)} == scales, "the scales that trained"
    assert {node.args[3:] for node in (*quantizes, *dequantizes)} == {(-128, 127, torch.int8)}
    assert all(len(node.users) == 1 for node in dequantizes)

    for node in calls(program.graph, Q.dequantize_per_channel.default):
        weight = getattr(program.graph, str(node.args[0].target))  # type: ignore[union-attr]
        assert weight.dtype == torch.int8
        assert weight.abs().flatten(1).max(dim=1).values.tolist() == [127] * len(weight)


@pytest.mark.parametrize("trained", [False, True])
def test_biases_lie_on_the_grid_of_the_runtime(
    trained: bool, nano_graph: GraphModule, inputs: Tensor, few_digits: ImageData
) -> None:
    """The runtime adds biases as integers of scale s_x s_w; left in float they would move results by a code."""
    ready = calibrated(nano_graph, inputs)
    if trained:
        fit(ready, few_digits, learned=True)
    graph = backend.convert(ready, few_digits.preprocess).graph
    checked = 0
    for node in calls(graph, aten.conv2d.default, aten.linear.default):
        bias = constant(graph, node.args[2]) if len(node.args) > 2 else None
        if bias is None or node.args[1].target != Q.dequantize_per_channel.default:  # type: ignore[union-attr]
            continue
        weight_scale = constant(graph, node.args[1].args[1])  # type: ignore[union-attr]
        assert weight_scale is not None
        integers = bias.detach().double() / (node.args[0].args[1] * weight_scale.double())  # type: ignore[union-attr, operator]
        rounding = integers.abs() * 2**-22 + 1e-6  # the bias is kept in float32
        assert ((integers - integers.round()).abs() <= rounding).all(), node
        assert integers.round().any(), node
        checked += 1
    assert checked > 10


def test_the_program_exports_for_one_image_in_nchw(
    nano_graph: GraphModule, inputs: Tensor, few_digits: ImageData
) -> None:
    program = backend.convert(calibrated(nano_graph, inputs), few_digits.preprocess)
    exported = program.export()
    (example,) = [
        n for n in exported.graph.nodes if n.op == "placeholder" and n.name == exported.graph_signature.user_inputs[0]
    ]
    value = example.meta["val"]
    assert tuple(value.shape) == (1, 3, 32, 32)
    assert value.stride() == (3072, 1024, 32, 1)
    with torch.no_grad():
        assert torch.equal(exported.module()(inputs[:1]), program(inputs[:1]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_images_that_are_no_numbers_are_refused_with_their_batch(
    bad: float, nano_graph: GraphModule, inputs: Tensor
) -> None:
    broken = inputs.clone()
    broken[20, 0, 3, 3] = bad
    with pytest.raises(UserError, match="calibration, batch 2: got NaN or infinity; expected finite activations"):
        backend.calibrate(prepared(nano_graph), broken.split(16))


def test_weights_that_overflow_are_refused(nano: HadaptiveNet, inputs: Tensor) -> None:
    with torch.no_grad():
        nano.tail.conv.weight.fill_(3e38)
    with pytest.raises(
        UserError, match=r"calibration, batch 1: got NaN or infinity.*check the checkpoint and the images"
    ):
        calibrated(deploy_graph(nano, 32), inputs)


def test_calibration_sees_every_batch(make_graph: Callable[..., GraphModule], inputs: Tensor) -> None:
    def ranges(batches: list[Tensor]) -> list[tuple[float, float]]:
        ready = backend.calibrate(prepared(make_graph(deploy_graph)), batches)
        return [(float(q.low), float(q.high)) for q in backend.activation_quantizers(ready.graph)]

    one, both = ranges([inputs[:8]]), ranges([inputs[:8], inputs[8:]])
    assert all(b[0] <= a[0] and a[1] <= b[1] for a, b in zip(one, both, strict=True))
    assert one != both


@pytest.mark.parametrize("learned", [True, False], ids=["learned", "following"])
def test_restored_graph_computes_what_the_saved_one_did(
    learned: bool, make_graph: Callable[..., GraphModule], inputs: Tensor, few_digits: ImageData, tmp_path: Path
) -> None:
    ready = calibrated(make_graph(deploy_graph), inputs)
    fit(ready, few_digits, learned)
    save_model(ready.graph, str(tmp_path / "state.safetensors"))
    restored = backend.restore(prepared(make_graph(deploy_graph)), tmp_path / "state.safetensors")
    assert torch.equal(simulated(restored, inputs), simulated(ready, inputs))
    assert_program_equals_simulation(restored, inputs, few_digits)
