"""Fake-quantizers: torch's values, LSQ's gradient, and scales that are the ones written."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization.fx import _decomposed  # noqa: F401 -- registers the operators a program is made of

from hadaptive_q.quant.backends import torchao_pt2e as backend
from hadaptive_q.quant.fake_quant import (
    MOVING_AVERAGE,
    ActivationFakeQuantize,
    PerChannelWeightFakeQuantize,
    activation_constructor,
    weight_constructor,
)
from hadaptive_q.quant.formats import SMALLEST_SCALE, ActivationFormat, WeightFormat
from hadaptive_q.quant.plan import make_plan
from hadaptive_q.recipe import QuantizeConfig
from hadaptive_q.rewrite.graph import trace

Q = torch.ops.quantized_decomposed
LOW, HIGH = -128, 127


def calibrated(*batches: Tensor, observer: str = "minmax") -> ActivationFakeQuantize:
    quantizer = ActivationFakeQuantize(observer=observer)  # type: ignore[arg-type]
    for batch in batches:
        assert quantizer(batch) is batch, "values pass unchanged while they are watched"
    quantizer.fix()
    return quantizer


def numbers(seed: int = 0, count: int = 1000) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def as_written(x: Tensor, quantizer: ActivationFakeQuantize) -> Tensor:
    """Quantize and dequantize by the operators of the converted program, with the scale that is written."""
    scale, zero_point = quantizer.calculate_qparams()
    settings = (float(scale), int(zero_point), LOW, HIGH, torch.int8)
    return Q.dequantize_per_tensor(Q.quantize_per_tensor(x, *settings), *settings)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.0, 6.0), (-5.0, 0.0), (-1e-3, 1e-3), (-1000.0, 10.0)])
def test_scale_and_zero_point_of_a_range(low: float, high: float) -> None:
    quantizer = calibrated(torch.tensor([low, high]))
    scale, zero_point = quantizer.calculate_qparams()
    assert (scale.shape, scale.dtype) == ((1,), torch.float32)
    assert (zero_point.shape, zero_point.dtype) == ((1,), torch.int32)
    assert float(scale) == pytest.approx(max((high - low) / 255, SMALLEST_SCALE), rel=1e-6)
    assert int(zero_point) == round(-128 - low / float(scale))
    # Zero is a code, and both ends are met to half a code.
    ends = torch.tensor([low, 0.0, high])
    assert quantizer(ends)[1] == 0
    assert float((quantizer(ends) - ends).abs().max()) <= 0.5001 * float(scale)


@pytest.mark.parametrize("observer", ["minmax", "mse"])
@pytest.mark.parametrize("phase", ["fixed", "learning", "following"])
def test_values_are_torchs_and_the_programs(observer: str, phase: str) -> None:
    quantizer = calibrated(numbers(), observer=observer)
    quantizer.learn(phase == "learning")
    quantizer.follow = phase == "following"
    x = numbers(1) * 2
    got = quantizer(x).detach()
    scale, zero_point = quantizer.calculate_qparams()
    codes = ((x * (1 / scale)).round() + zero_point).clamp(LOW, HIGH)
    assert torch.equal(got, (codes - zero_point) * scale)
    assert torch.equal(got, torch.fake_quantize_per_tensor_affine(x, scale, zero_point, LOW, HIGH))
    assert torch.equal(got, as_written(x, quantizer))
    assert codes.min() == LOW, "clipping is part of what is compared"
    assert codes.max() == HIGH


@pytest.mark.parametrize("zero_point", [0, 1, -1, 7])
def test_ties_are_rounded_as_in_the_program(zero_point: int) -> None:
    quantizer = calibrated(torch.tensor([-1.0, 1.0]))
    quantizer.scale.data.fill_(0.5)
    quantizer.zero_point.fill_(zero_point)
    x = torch.arange(-100, 100) / 4  # every other value lies half way between two codes
    assert torch.equal(quantizer(x), as_written(x, quantizer))


def test_the_gradient_passes_inside_the_range_and_stops_outside() -> None:
    quantizer = calibrated(torch.tensor([-1.0, 1.0]))
    x = torch.tensor([-3.0, -0.9, 0.0, 0.3, 0.9, 3.0], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 0]
    assert quantizer.scale.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zero_point", [0, -128, 7])
@pytest.mark.parametrize("learned", [False, True])
def test_the_gradient_stops_where_torchs_does(dtype: torch.dtype, zero_point: int, learned: bool) -> None:
    quantizer = calibrated(torch.tensor([-1.0, 1.0]))
    quantizer.scale.data.fill_(0.5)
    quantizer.zero_point.fill_(zero_point)
    quantizer.learn(learned)
    steps = torch.arange(-600, 600).to(dtype) / 8  # also the edges and ties, both beyond and within them
    weights = torch.linspace(-2, 2, len(steps)).to(dtype)
    gradients = []
    for operator in (quantizer, lambda x: torch.fake_quantize_per_tensor_affine(x, 0.5, zero_point, LOW, HIGH)):
        x = steps.clone().requires_grad_()
        out = operator(x)
        assert out.dtype == dtype
        (gradient,) = torch.autograd.grad(out, x, weights)
        gradients.append(gradient)
        assert not out[out == 0].signbit().any(), "a code has no sign of zero"
    assert torch.equal(*gradients)
    assert (gradients[0] == 0).any()
    assert (gradients[0] != 0).any()


def reference(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """LSQ by autograd alone: rounding passes gradients straight through, everything else is ordinary."""
    ratio = x / scale
    rounded = ratio + (ratio.round() - ratio).detach()
    return ((rounded + zero_point).clamp(LOW, HIGH) - zero_point) * scale


@pytest.mark.parametrize("shift", [0.0, 2.0, -5.0])
def test_the_scale_learns_by_lsq(shift: float) -> None:
    quantizer = calibrated(numbers() + shift)
    quantizer.learn(True)
    x = (numbers(1) * 2 + shift).requires_grad_()
    weights = numbers(2)
    (quantizer(x) * weights).sum().backward()
    got_x, got_scale = x.grad, quantizer.scale.grad
    assert got_x is not None
    assert got_scale is not None

    other, scale = x.detach().requires_grad_(), quantizer.scale.detach().clone().requires_grad_()
    (reference(other, scale, quantizer.zero_point) * weights).sum().backward()
    assert other.grad is not None
    assert scale.grad is not None
    torch.testing.assert_close(got_x, other.grad, rtol=1e-6, atol=0)  # the reference multiplies and divides by s
    # Esser et al. divide by sqrt(values * largest code), so that scales and weights learn at one pace.
    wanted = scale.grad / (x.numel() * HIGH) ** 0.5
    assert float(wanted.abs()) > 1e-3, "nothing to compare"
    torch.testing.assert_close(got_scale, wanted, rtol=1e-4, atol=1e-6)


def test_learning_a_scale_lowers_the_error() -> None:
    x = numbers(count=4000) - 1
    x[0], x[1] = 60.0, -60.0  # outliers made the range too wide, on both sides: the zero point stays
    quantizer = calibrated(x)
    quantizer.learn(True)
    optimizer = torch.optim.Adam([quantizer.scale], lr=5e-3)
    errors = []
    for _ in range(100):
        optimizer.zero_grad()
        error = (quantizer(x[2:]) - x[2:]).square().mean()
        error.backward()
        optimizer.step()
        errors.append(float(error))
    assert errors[-1] < 0.2 * errors[0]


@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("stepped_to", [1e-6, 0.0, -0.1])
def test_a_scale_that_was_stepped_too_far_is_used_as_it_is_written(stepped_to: float, active: bool) -> None:
    quantizer = calibrated(torch.tensor([-1.0, 1.0]))
    quantizer.learn(True)
    with torch.no_grad():
        quantizer.scale.fill_(stepped_to)
    quantizer.learn(active)  # frozen ranges must not uncover the raw number
    x = torch.linspace(-0.05, 0.05, 101)
    scale, _ = quantizer.calculate_qparams()
    assert float(scale) == SMALLEST_SCALE
    assert torch.equal(quantizer(x).detach(), as_written(x, quantizer))
    assert float((quantizer(x).detach() - x)[30:70].abs().max()) <= SMALLEST_SCALE


@pytest.mark.parametrize("values", [[0.0, 0.0], [1e-9, -1e-9], [0.01, -0.01]])
def test_no_scale_is_below_two_to_the_minus_twelve(values: list[float]) -> None:
    quantizer = calibrated(torch.tensor(values))
    assert float(quantizer.calculate_qparams()[0]) == SMALLEST_SCALE == 2**-12
    assert float(quantizer.scale.detach()) == SMALLEST_SCALE


def test_following_is_a_moving_average_of_batches() -> None:
    quantizer = calibrated(torch.tensor([-1.0, 3.0]))
    quantizer.follow = True
    low, high = -1.0, 3.0
    for batch_low, batch_high in [(-2.0, 5.0), (0.5, 4.0), (-3.0, -1.0)]:  # a range always contains 0
        quantizer(torch.tensor([batch_low, batch_high], requires_grad=True))
        low += MOVING_AVERAGE * (min(batch_low, 0) - low)
        high += MOVING_AVERAGE * (max(batch_high, 0) - high)
        scale, zero_point = quantizer.calculate_qparams()
        assert float(scale) == pytest.approx((high - low) / 255, rel=1e-5)
        assert int(zero_point) == round(-128 - low / float(scale))


def test_a_floor_holds_while_ranges_follow() -> None:
    quantizer = ActivationFakeQuantize(floor=-3.0)
    quantizer(torch.tensor([-20.0, 6.0]))
    quantizer.fix()
    quantizer.follow = True
    for _ in range(3):
        quantizer(torch.tensor([-50.0, 6.0], requires_grad=True))
    scale, zero_point = quantizer.calculate_qparams()
    assert float(scale) == pytest.approx(9 / 255)
    assert (LOW - int(zero_point)) * float(scale) == pytest.approx(-3, abs=float(scale))


def test_two_tensors_of_one_scale_pass_gradients_while_it_follows() -> None:
    quantizer = calibrated(torch.tensor([-1.0, 3.0]))
    quantizer.follow = True
    one, two = torch.tensor([-2.0, 0.5], requires_grad=True), torch.tensor([-4.0, 0.5], requires_grad=True)
    (quantizer(one).sum() + quantizer(two).sum()).backward()
    assert one.grad is not None
    assert two.grad is not None
    assert (one.grad.tolist(), two.grad.tolist()) == ([0, 1], [0, 1])


def test_ranges_do_not_follow_at_inference_nor_once_fixed() -> None:
    quantizer = calibrated(torch.tensor([-1.0, 3.0]))
    before = [t.clone() for t in quantizer.calculate_qparams()]
    quantizer.follow = True
    with torch.no_grad():
        quantizer(torch.tensor([-9.0, 9.0]))
    quantizer.follow = False
    quantizer(torch.tensor([-9.0, 9.0]))
    assert all(torch.equal(a, b) for a, b in zip(before, quantizer.calculate_qparams(), strict=True))


def test_the_observer_watches_until_the_range_is_fixed() -> None:
    quantizer = calibrated(torch.tensor([-1.0, 3.0]))
    quantizer(torch.tensor([-50.0, 50.0]))
    assert float(quantizer.observer.high) == 3.0
    with pytest.raises(FloatingPointError):
        ActivationFakeQuantize()(torch.tensor([float("nan")]))


def test_state_and_ranges_travel_with_the_state_dict() -> None:
    quantizer, other = calibrated(numbers()), calibrated(torch.tensor([-1.0, 1.0]))
    other.load_state_dict(quantizer.state_dict())
    x = numbers(3)
    assert torch.equal(other(x), quantizer(x))
    for each in (quantizer, other):
        each.follow = True
        each(x.requires_grad_())
    assert torch.equal(other.scale, quantizer.scale)


# Weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 3, 2, 2), (8, 1, 5, 5), (10, 20)])
def test_weights_are_scaled_by_their_largest_value_of_each_channel(shape: tuple[int, ...]) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    quantizer = PerChannelWeightFakeQuantize()
    got = quantizer(w)
    scale, zero_point = quantizer.calculate_qparams()
    largest = w.abs().reshape(shape[0], -1).max(dim=1).values
    assert torch.equal(scale, largest / 127), "not (max - min) / 254, not a moving average"
    assert torch.equal(zero_point, torch.zeros(shape[0], dtype=torch.int32))

    column = scale.reshape(-1, *(1,) * (w.dim() - 1))
    codes = (w * (1 / column)).round().clamp(-127, 127)
    assert torch.equal(got, codes * column)
    assert codes.abs().reshape(shape[0], -1).max(dim=1).values.tolist() == [127] * shape[0]
    settings = (scale, zero_point.long(), 0, -127, 127, torch.int8)
    assert torch.equal(got, Q.dequantize_per_channel(Q.quantize_per_channel(w, *settings), *settings))
    assert float((got - w).abs().max()) <= 0.5001 * float(scale.max())


def test_weight_scales_are_those_of_the_weight_as_it_is_now() -> None:
    quantizer = PerChannelWeightFakeQuantize()
    w = torch.ones(2, 3)
    quantizer(w)
    quantizer(w * 5)
    assert quantizer.calculate_qparams()[0].tolist() == pytest.approx([5 / 127] * 2)


def test_held_scales_stay_whatever_becomes_of_the_weight() -> None:
    quantizer, other = PerChannelWeightFakeQuantize(), PerChannelWeightFakeQuantize()
    quantizer.hold(torch.tensor([0.5, 0.25]))
    w = torch.tensor([[1.2, 90.0], [-0.3, 0.1]])
    assert quantizer(w).tolist() == [[1.0, 63.5], [-0.25, 0.0]], "clipped at 127 steps"
    other(w)
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other(w * 3), quantizer(w * 3))
    assert quantizer.calculate_qparams()[0].tolist() == [0.5, 0.25]
    small = weight_constructor(WeightFormat(2))()
    small.hold(torch.tensor([1.0, 0.0]))
    assert small.scale.tolist() == [1.0, 2.0**-12], "the accumulator's limit holds for them, too"


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize(("own", "bits"), [(4, 8), (4, 5), (2, 3)])
def test_refined_weights_have_more_codes_over_the_same_range(own: int, bits: int, held: bool) -> None:
    quantizer = weight_constructor(WeightFormat(own))()
    weight = torch.randn(3, 500, generator=torch.Generator().manual_seed(0))
    if held:
        quantizer.hold(weight.abs().amax(1) / 2**own)  # clips
    coarse = quantizer(weight)
    quantizer.refine(bits)
    fine = quantizer(weight)
    top, low = (WeightFormat(count).code_range[1] for count in (bits, own))
    assert fine.unique(dim=1).shape[1] > coarse.unique(dim=1).shape[1]
    torch.testing.assert_close(fine.abs().amax(1), coarse.abs().amax(1), rtol=1e-6, atol=0)
    step = fine.abs().amax(1, keepdim=True) / top
    torch.testing.assert_close(fine / step, (fine / step).round(), rtol=0, atol=1e-3)
    assert torch.equal(quantizer.calculate_qparams()[0] * low, quantizer.scale * low), "what is written stays"
    for fewer in (own, own - 1):
        quantizer.refine(fewer)
        assert torch.equal(quantizer(weight), coarse)


@pytest.mark.parametrize("shape", [(6, 3, 2, 2), (10, 20)])
def test_a_held_scale_learns_by_lsq_and_clipped_weights_wait(shape: tuple[int, ...]) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    quantizer = PerChannelWeightFakeQuantize(-7, 7)
    quantizer(w)
    quantizer.hold(quantizer.scale.detach() * 0.6)
    quantizer.learn(True)
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    (quantizer(w) * weights).sum().backward()
    got_w, got_scale = w.grad, quantizer.scale.grad

    other, scale = w.detach().requires_grad_(), quantizer.scale.detach().clone().requires_grad_()
    column = scale.reshape(-1, *(1,) * (w.dim() - 1))
    ratio = other / column
    rounded = ratio + (ratio.round() - ratio).detach()
    # A code of 7.4 is rounded to 7, not clipped: its gradient passes.
    clipped = torch.where(ratio.detach().round().abs() <= 7, rounded, rounded.detach().clamp(-7, 7))
    (clipped * column * weights).sum().backward()
    assert got_w is not None
    assert got_scale is not None
    assert other.grad is not None
    assert scale.grad is not None
    assert 0 < int((got_w == 0).sum()) < w.numel() / 2, "some weights are clipped"
    torch.testing.assert_close(got_w, other.grad, rtol=1e-6, atol=0)
    wanted = scale.grad / (w[0].numel() * 7) ** 0.5
    torch.testing.assert_close(got_scale, wanted, rtol=1e-4, atol=1e-5)


def test_a_scale_that_follows_its_weight_is_not_learned() -> None:
    quantizer = PerChannelWeightFakeQuantize()
    quantizer(torch.ones(2, 3))
    quantizer.learn(True)
    assert not quantizer.scale.requires_grad


def test_a_channel_of_zeros_stays_zero() -> None:
    w = torch.stack((torch.zeros(4), torch.ones(4)))
    quantizer = PerChannelWeightFakeQuantize()
    assert torch.equal(quantizer(w), w)
    assert quantizer.calculate_qparams()[0].isfinite().all()
    assert (quantizer.calculate_qparams()[0] > 0).all()


def test_no_weight_is_clipped_so_every_weight_has_a_gradient() -> None:
    w = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    PerChannelWeightFakeQuantize()(w).sum().backward()
    assert w.grad is not None
    assert torch.equal(w.grad, torch.ones_like(w))


@pytest.mark.parametrize("bits", [4, 8])
def test_constructors_take_the_codes_of_their_format(bits: int) -> None:
    activation = activation_constructor(ActivationFormat(bits), "mse")()
    assert isinstance(activation, ActivationFakeQuantize)
    assert (activation.quant_min, activation.quant_max) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert (activation.observer.name, activation.observer.levels) == ("mse", 2**bits)
    weight = weight_constructor(WeightFormat(bits))()
    assert isinstance(weight, PerChannelWeightFakeQuantize)
    assert (weight.quant_min, weight.quant_max) == (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)
    w = torch.randn(3, 50)
    weight(w)
    codes = (w / weight.scale[:, None]).round()
    assert float(codes.abs().max()) == 2 ** (bits - 1) - 1


def test_with_four_bits_no_scale_is_next_to_nothing() -> None:
    """A channel of all but no weights would have its bias in steps too small for the accumulator."""
    w = torch.tensor([[0.0, 0.0], [1e-9, 0.0], [7.0, -3.5], [0.7, 0.07]])
    small, whole = weight_constructor(WeightFormat(4))(), weight_constructor(WeightFormat(8))()
    assert small(w)[:2].tolist() == [[0.0, 0.0]] * 2
    assert small.scale.tolist() == pytest.approx([2**-12, 2**-12, 1, 0.1])
    assert small(w)[2].tolist() == [7, -4], "half to even"
    whole(w)
    assert float(whole.scale[1]) == pytest.approx(torch.finfo(torch.float32).eps)


def test_a_graph_under_training_compiles_in_one_piece() -> None:
    """No branch on a buffer: it would cut the graph at every fake-quantizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Hardswish(), nn.Conv2d(8, 4, 1)).eval()
    graph, x = trace(model, 8), torch.randn(4, 3, 8, 8)
    ready = backend.calibrate(backend.prepare(graph, make_plan(graph, QuantizeConfig()), "minmax"), [x])
    backend.start_fit(ready, learned=True)
    compiled = torch.compile(ready.graph, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), ready.graph(x))
    backend.freeze_ranges(ready)
    assert torch.equal(compiled(2 * x), ready.graph(2 * x))


def test_the_phase_comes_back_with_the_state() -> None:
    quantizer, x = ActivationFakeQuantize(), torch.tensor([-1.0, 0.3, 2.0])
    quantizer(x)
    quantizer.fix()
    other = ActivationFakeQuantize()
    assert torch.equal(other(x), x)
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other(x), quantizer(x))
    assert not torch.equal(other(x), x)
