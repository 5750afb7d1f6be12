"""The Brevitas backend on the nano network: scales of its own, the program and the files of the other backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_model
from torch import Tensor
from torch.fx import GraphModule

from hadaptive_q.data.datasets import ImageData
from hadaptive_q.lower.executorch import lower
from hadaptive_q.lower.onnx import OnnxFile, to_onnx
from hadaptive_q.lower.parity import sqnr_db
from hadaptive_q.lower.runtime import PteFile
from hadaptive_q.quant.backends import brevitas, torchao_pt2e
from hadaptive_q.quant.backends.brevitas import LearnedQuantizer, least_error_scale
from hadaptive_q.quant.backends.torchao_pt2e import Calibrated
from hadaptive_q.quant.damping import oscillation_damping
from hadaptive_q.quant.fake_quant import ActivationFakeQuantize, PerChannelWeightFakeQuantize
from hadaptive_q.quant.formats import ActivationFormat, WeightFormat
from hadaptive_q.quant.interpreter import IntegerProgram
from hadaptive_q.quant.plan import make_plan
from hadaptive_q.quant.program import QuantizedProgram
from hadaptive_q.quant.sites import FakeQuantizer, bits_of, find_sites
from hadaptive_q.recipe import FitConfig, QuantizeConfig
from hadaptive_q.rewrite.deploy import deploy_graph
from hadaptive_q.rewrite.graph import constant, set_dropout
from hadaptive_q.train.loop import Training, train

# Scales move by some per cent in six steps at this rate.
FIT = FitConfig(epochs=2, batch_size=32, lr=2e-4, precision="float32")
LOW_BITS = QuantizeConfig(weight_bits=4, pointwise_weight_bits=4, layers={"blocks.0": 3}, activation_bits=4)


def calibrated(graph: GraphModule, inputs: Tensor, config: QuantizeConfig) -> Calibrated:
    prepared = torchao_pt2e.prepare(graph, make_plan(graph, config), "mse")
    return brevitas.calibrate(prepared, inputs.split(16))


def learners(ready: Calibrated) -> list[LearnedQuantizer]:
    return [module for module in ready.graph.modules() if isinstance(module, LearnedQuantizer)]


def logits(ready: Calibrated, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = ready.graph(inputs)
    return out


def quantizers(ready: Calibrated) -> list[FakeQuantizer]:
    return [site.quantizer for site in find_sites(ready.graph)]


def weight_codes(ready: Calibrated) -> dict[str, Tensor]:
    """Return the codes of every weight as it is rounded now, whoever rounds it, without signs."""
    found = {}
    for node in ready.graph.graph.nodes:
        weight = constant(ready.graph, node.args[0]) if node.op == "call_module" else None
        if weight is None:
            continue
        module = ready.graph.get_submodule(node.target)
        scale = module.quant(weight)[1] if isinstance(module, LearnedQuantizer) else module.calculate_qparams()[0]
        column = scale.detach().reshape(-1, *(1,) * (weight.dim() - 1))
        found[str(node.args[0].target)] = (module(weight).detach() / column).round().abs()
    return found


def numbers(count: int = 4000) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(6, 40), (6, 1, 3, 3)])
def test_scales_leave_less_error_than_the_largest_weight_does(shape: tuple[int, ...], bits: int) -> None:
    weight = numbers(math.prod(shape)).reshape(shape)
    weight[0] = 0
    top = WeightFormat(bits).code_range[1]
    errors = []
    for scale in (least_error_scale(weight, bits), weight.flatten(1).abs().amax(dim=1) / top):
        assert scale.shape == (6,)
        column = scale.clamp_min(1e-9).reshape(-1, *(1,) * (weight.dim() - 1))
        rounded = (weight / column).round().clamp(-top, top) * column
        errors.append((rounded - weight).square().flatten(1).sum(dim=1))
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()
    if bits < 4:
        assert float(errors[0].sum()) < 0.9 * float(errors[1].sum())


def origins() -> list[tuple[FakeQuantizer, Tensor]]:
    """Return fake-quantizers with something to round: activations, some beyond the codes, and weights."""
    found: list[tuple[FakeQuantizer, Tensor]] = []
    for bits in (4, 8):
        low, high = ActivationFormat(bits).code_range
        activation = ActivationFakeQuantize(quant_min=low, quant_max=high)
        activation.set_range(torch.tensor(-0.7), torch.tensor(2.1))
        found.append((activation, numbers()))
    for bits, shape in ((2, (8, 500)), (4, (20, 2, 10, 10)), (8, (40, 1, 10, 10))):
        low, high = WeightFormat(bits).code_range
        weights, values = PerChannelWeightFakeQuantize(low, high), numbers().reshape(shape)
        weights.hold(least_error_scale(values, bits))
        found.append((weights, values))
    return found


def distance(one: Tensor, other: Tensor, quantizer: FakeQuantizer) -> Tensor:
    """Return how many codes two results of a quantizer are apart."""
    scale = quantizer.calculate_qparams()[0]
    return ((one - other) / scale.reshape(-1, *(1,) * (one.dim() - 1))).abs().round()


@pytest.mark.parametrize(("origin", "x"), origins(), ids=["a4", "a8", "w2", "w4", "w8"])
def test_a_learner_starts_as_what_it_stands_for_and_gives_it_what_it_learned(origin: FakeQuantizer, x: Tensor) -> None:
    with torch.no_grad():
        wanted = origin(x)
    weight = isinstance(origin, PerChannelWeightFakeQuantize)
    learner = LearnedQuantizer(origin, x.dim() if weight else 1)
    optimizer = torch.optim.Adam([p for p in learner.quant.parameters() if p.requires_grad], lr=1e-3)
    y = learner(x)
    # Brevitas adds the zero point before it rounds: values halfway between two codes may fall to the other one.
    assert float((distance(y, wanted, origin) > 0).float().mean()) < 0.002
    assert float(distance(y, wanted, origin).max()) <= 1
    (y - x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        wanted = learner(x)
    _, scale, zero_point, bits = learner.quant(x)
    before = origin.calculate_qparams()[0].clone()

    assert learner.read_out() is origin
    after, code = origin.calculate_qparams()
    assert torch.equal(after, scale.flatten()), "what trained is what ships"
    assert float((after / before - 1).abs().min()) > 1e-3
    assert int(zero_point) == int(code[0])
    assert int(bits) == bits_of(origin)
    with torch.no_grad():
        found = origin(x)
    assert float((distance(found, wanted, origin) > 0).float().mean()) < 0.002


@pytest.mark.parametrize(("origin", "x"), [pair for pair in origins() if bits_of(pair[0]) < 8 and pair[1].dim() > 1])
def test_refined_weights_are_rounded_as_the_fake_quantizer_would(origin: FakeQuantizer, x: Tensor) -> None:
    assert isinstance(origin, PerChannelWeightFakeQuantize)
    learner = LearnedQuantizer(origin, x.dim())
    for bits in (8, 5, bits_of(origin)):
        learner.refine(bits)
        origin.refine(bits)
        with torch.no_grad():
            apart = ((learner(x) - origin(x)).abs() > 1e-4 * x.abs().max()).float().mean()
        assert int(learner.quant(x)[3]) == bits
        assert float(apart) < 0.002, "but for values halfway between two codes"


@pytest.mark.parametrize("config", [QuantizeConfig(), LOW_BITS], ids=["int8", "low bits"])
def test_what_trains_is_what_ships(
    config: QuantizeConfig,
    make_graph: Callable[..., GraphModule],
    inputs: Tensor,
    few_digits: ImageData,
    tmp_path: Path,
) -> None:
    graph = make_graph(deploy_graph, "static")  # no choices: nothing but rounding comes between two results
    ready = calibrated(graph, inputs, config)
    plan = ready.plan
    before = {id(q): q.calculate_qparams()[0].clone() for q in quantizers(ready)}
    brevitas.start_fit(ready, learned=True, weights=True)
    owners = plan.activations.keys() - plan.shared.keys()
    assert len(learners(ready)) == len(owners) + len(plan.weights), "one where tensors share a scale"
    train(ready.graph, few_digits, Training(FIT, 0, "qat"))
    set_dropout(ready.graph, active=False)
    simulated = logits(ready, inputs)

    brevitas.read_out(ready)
    assert learners(ready) == []
    moved = [(q.calculate_qparams()[0] / before[id(q)] - 1).abs().mean() for q in quantizers(ready)]
    assert len(moved) == len(before)
    assert 1e-4 < float(torch.stack(moved).median()) < 0.1
    apart = (logits(ready, inputs) - simulated).abs() / quantizers(ready)[-1].calculate_qparams()[0]
    # Equal but for halves that fell to the other code, somewhere on the way.
    assert float((apart > 0.5).float().mean()) < 0.05
    assert float(apart.max()) < 3

    brevitas.end_fit(ready)
    wanted = logits(ready, inputs)
    save_model(ready.graph, str(tmp_path / "state.safetensors"))
    program = torchao_pt2e.convert(ready, few_digits.preprocess)
    assert torch.equal(program(inputs), wanted)
    again = make_graph(deploy_graph, "static")
    prepared = torchao_pt2e.prepare(again, make_plan(again, config), "mse")
    restored = torchao_pt2e.restore(prepared, tmp_path / "state.safetensors")
    assert torch.equal(logits(restored, inputs), wanted)
    if config == LOW_BITS:  # int8 is lowered by every other test
        assert_files_are_the_program(program, inputs, tmp_path)


def assert_files_are_the_program(program: QuantizedProgram, inputs: Tensor, folder: Path) -> None:
    lowered = lower(program.export())
    assert lowered.coverage.delegates == 1
    assert lowered.coverage.portable_ops == ()
    (folder / "model.pte").write_bytes(lowered.data)
    file = PteFile(folder / "model.pte")
    images = torch.cat((inputs, inputs * 3))  # beyond the ranges, too
    shipped = torch.cat([file(image[None]) for image in images])
    assert torch.equal(IntegerProgram(program)(images), shipped)
    assert len(shipped.unique()) > 50
    (folder / "model.onnx").write_bytes(to_onnx(program))
    onnx = OnnxFile(folder / "model.onnx")(images)
    assert sqnr_db(program(images), onnx) > 15
    assert sqnr_db(program(images), shipped) > 15


@pytest.mark.parametrize("batch_norm", ["folded", "live"])
def test_ranges_may_follow_and_batch_norm_may_live(
    batch_norm: str, nano_graph: GraphModule, inputs: Tensor, few_digits: ImageData
) -> None:
    config = QuantizeConfig(weight_bits=4, pointwise_weight_bits=4)
    ready = calibrated(nano_graph, inputs, config)
    brevitas.start_fit(ready, learned=False, weights=True, live=[inputs] if batch_norm == "live" else None)
    assert len(learners(ready)) == len(ready.plan.weights), "weights learn, activations follow their batches"
    penalty = oscillation_damping(ready.graph, 1.0)()
    assert float(penalty) > 0
    train(ready.graph, few_digits, Training(FIT, 0, "qat"))
    brevitas.freeze_ranges(ready)
    assert not any(p.requires_grad for learner in learners(ready) for p in learner.parameters())
    codes = weight_codes(ready)
    brevitas.end_fit(ready)
    for name, own in weight_codes(ready).items():
        assert float((own != codes[name]).float().mean()) < 0.002, f"folding moves no code of {name}"
    wanted = logits(ready, inputs)
    assert torch.equal(torchao_pt2e.convert(ready, few_digits.preprocess)(inputs), wanted)
