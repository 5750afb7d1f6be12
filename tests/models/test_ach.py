"""ACH against the authors' vectors, a one-hot reference written out here, and the temperature rule step by step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from hadaptive_q.models.ach import ACH, ChannelScorer, DySoft, gather_channels
from hadaptive_q.models.config import Norm, SlotOrder
from hadaptive_q.models.cross_hadamard import pair_indices

AUTHORS_NAMES = {"fc": "pointwise", "norm_x": "bn", "eva_net.conv": "scorer", "norm": "norm"}
GOLDEN_TOLERANCE = 1e-4  # absolute, float32, as the vectors were published
NORMS = cast(list[Norm], ["dysoft", "batch_norm"])
GOLDEN_NORMS = [("ach_dysoft", "dysoft"), ("ach_bn", "batch_norm")]


def authors_module(file: Path, norm: Norm) -> tuple[ACH, dict[str, Tensor]]:
    """Return the authors' module (C 20, Cs 6) as ours, in eval mode, and the vectors of the file."""
    vectors = {name: torch.from_numpy(array) for name, array in np.load(file).items()}
    renamed = {}
    for name, tensor in vectors.items():
        if not name.startswith("sd/") or name.startswith(("sd/hadamard", "sd/tau")):
            continue
        module, _, leaf = name.removeprefix("sd/").rpartition(".")
        renamed[f"{AUTHORS_NAMES[module]}.{leaf}"] = tensor
    ach = ACH(20, 6, norm)
    missing, unknown = ach.load_state_dict({**renamed, "scorer.tau": vectors["sd/tau"]}, strict=False)
    assert unknown == []
    assert missing == ["scorer.gradient_norm", "scorer.stored_norm"]
    return ach.eval(), vectors


def randomised(ach: ACH) -> ACH:
    """Move norms and the pointwise bias away from their start, so that no gradient vanishes by symmetry."""
    with torch.no_grad():
        for name, parameter in ach.named_parameters():
            if not name.startswith(("pointwise.weight", "scorer")):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return ach


def straight_through(ach: ACH, x: Tensor) -> Tensor:
    """The definition, in training mode without noise, by one-hot matrices and plain autograd."""
    mixed = ach.bn(ach.pointwise(x))
    scores = torch.nn.functional.conv1d(mixed.mean((2, 3))[:, None], ach.scorer.weight, padding=2)[:, 0]
    soft = (scores / ach.scorer.tau).softmax(dim=1)
    chosen = soft.argsort(dim=1, descending=True)[:, : ach.cs]
    hard = torch.nn.functional.one_hot(chosen, x.shape[1]).to(x.dtype)  # (B, Cs, C)
    selection = hard - hard * soft[:, None].detach() + hard * soft[:, None]
    z = torch.einsum("bkc,bchw->bkhw", selection, mixed)
    q = torch.stack([z[:, i] * z[:, j] for i in range(ach.cs) for j in range(i + 1, ach.cs)], dim=1)
    if isinstance(ach.norm, DySoft):
        t = ach.norm.alpha * q
        return torch.cat((mixed, ach.norm.weight * t / (1 + t.abs()) + ach.norm.bias), dim=1)
    return torch.cat((mixed, ach.norm(q)), dim=1)


@pytest.mark.parametrize(("file", "norm"), GOLDEN_NORMS)
def test_the_authors_outputs_scores_and_selections(file: str, norm: Norm, golden: Path) -> None:
    ach, vectors = authors_module(golden / f"{file}.npz", norm)
    with torch.no_grad():
        mixed = ach.bn(ach.pointwise(vectors["x"]))
        scores = ach.scorer(mixed)
        assert torch.allclose(scores, vectors["scores"], rtol=0, atol=GOLDEN_TOLERANCE)
        assert torch.equal(ach.select(scores), vectors["selected"])
        assert torch.allclose(ach(vectors["x"]), vectors["y"], rtol=0, atol=GOLDEN_TOLERANCE)
    # Not a vector that any selection would satisfy.
    assert len({tuple(row) for row in vectors["selected"].tolist()}) == 3


@pytest.mark.parametrize(("file", "norm"), GOLDEN_NORMS)
def test_the_authors_pairs(file: str, norm: Norm, golden: Path) -> None:
    ach, vectors = authors_module(golden / f"{file}.npz", norm)
    assert torch.equal(ach.pair_i, vectors["sd/hadamard_i"])
    assert torch.equal(ach.pair_j, vectors["sd/hadamard_j"])


@pytest.mark.parametrize(("channels", "cs"), [(20, 6), (96, 16), (128, 32)])
def test_parameter_formula(channels: int, cs: int) -> None:
    ach = ACH(channels, cs)
    products = cs * (cs - 1) // 2
    assert ach.out_channels == channels + products
    expected = channels**2 + channels + 2 * channels + 5 + 2 * products + 1
    assert sum(p.numel() for p in ach.parameters() if p.requires_grad) == expected


@pytest.mark.parametrize("cs", [1, 17])
def test_more_channels_than_there_are_cannot_be_chosen(cs: int) -> None:
    with pytest.raises(ValueError, match=r"cs must lie in \[2, 16\]"):
        ACH(16, cs)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("tau", [4.0, 0.05])
def test_the_training_pass_equals_the_one_hot_definition(norm: Norm, tau: float) -> None:
    torch.manual_seed(0)
    ach = randomised(ACH(12, 4, norm)).double().train()
    ach.noise.zero_()
    ach.scorer.tau.fill_(tau)
    reference = copy.deepcopy(ach)
    x = torch.randn(3, 12, 5, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, ach.out_channels, 5, 4, dtype=torch.float64)

    def run(module: ACH, y: Tensor) -> dict[str, Tensor]:
        names = [name for name, _ in module.named_parameters()]
        gradients = torch.autograd.grad((y * weights).sum(), [x, *module.parameters()])
        return dict(zip(["x", *names], gradients, strict=True))

    y, wanted_y = ach(x), straight_through(reference, x)
    # Everything is in double except M, which is made in float32 whatever the type around it: 1e-6.
    torch.testing.assert_close(y, wanted_y, rtol=1e-12, atol=1e-12)
    got, wanted = run(ach, y), run(reference, wanted_y)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        scale = float(gradient.abs().max())
        if name != "pointwise.bias":  # the BatchNorm behind it removes any bias: its gradient is rounding
            assert scale > 1e-6, f"{name}: nothing to compare"
        assert float((got[name] - gradient).abs().max()) <= 1e-5 * max(scale, 1e-6), name


def test_the_scorer_is_pulled_towards_channels_whose_products_help() -> None:
    """The factor's gradient is that of `hard - sg(M) + M`; the released code has the opposite sign."""
    ach = ACH(4, 2).double().train()
    ach.noise.zero_()
    soft = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
    scores = soft.log().mul(4.0).requires_grad_()  # tau is 4, so softmax(scores / 4) is `soft`
    x = torch.rand(1, 4, 2, 2, dtype=torch.float64) + 0.5  # positive
    z = ach._gumbel_gather(x, scores)
    assert torch.equal(z, x[:, :2])
    z.sum().backward()  # a larger factor raises the sum, so larger M of the chosen must
    assert scores.grad is not None
    hard_gradient = torch.zeros(4, dtype=torch.float64)
    hard_gradient[:2] = x[0, :2].sum((1, 2))
    jacobian = (torch.diag(soft[0]) - torch.outer(soft[0], soft[0])) / 4
    torch.testing.assert_close(scores.grad[0], jacobian @ hard_gradient, rtol=1e-5, atol=1e-7)
    assert (scores.grad[0, :2] > 0).all()
    assert (scores.grad[0, 2:] < 0).all()


def test_dysoft_trains_by_the_gradient_of_its_formula() -> None:
    torch.manual_seed(0)
    norm = randomised_dysoft(6).double()
    q = (torch.randn(2, 6, 3, 3, dtype=torch.float64) * 3).requires_grad_()
    tensors = [q, norm.alpha, norm.weight, norm.bias]
    trained, defined = norm.train()(q), norm.eval()(q)
    torch.testing.assert_close(trained, defined, rtol=1e-14, atol=1e-14)
    gradient = torch.randn_like(trained)
    got, wanted = torch.autograd.grad(trained, tensors, gradient), torch.autograd.grad(defined, tensors, gradient)
    for one, other in zip(got, wanted, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def randomised_dysoft(channels: int) -> DySoft:
    norm = DySoft(channels)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
    return norm


def test_dysoft_is_bounded_by_its_weight_and_bias() -> None:
    norm = randomised_dysoft(6).eval()
    y = norm(torch.randn(4, 6, 8, 8) * 1e4)
    assert ((y - norm.bias).abs() <= norm.weight.abs() + 1e-6).all()


@pytest.mark.parametrize("norm", NORMS)
def test_training_under_autocast(norm: Norm) -> None:
    """bf16 is what "auto" precision means on a GPU."""
    torch.manual_seed(0)
    ach, x = ACH(12, 4, norm).train(), torch.randn(4, 12, 5, 5, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ach(x).float().square().mean()
    loss.backward()
    assert x.grad is not None
    for name, gradient in [("x", x.grad), *((n, p.grad) for n, p in ach.named_parameters())]:
        assert gradient is not None, name
        assert gradient.dtype == torch.float32, name
        assert gradient.isfinite().all(), name


def test_noise_changes_what_training_selects_and_its_absence_does_not() -> None:
    torch.manual_seed(0)
    ach, x = ACH(16, 4).train(), torch.randn(4, 16, 6, 6)
    with torch.no_grad():
        assert not torch.equal(ach(x)[:, 16:], ach(x)[:, 16:])
        ach.noise.zero_()
        assert torch.equal(ach(x)[:, 16:], ach(x)[:, 16:])


@pytest.mark.parametrize("slot_order", ["rank", "channel"])
def test_without_noise_training_selects_as_inference_at_any_temperature(slot_order: SlotOrder) -> None:
    torch.manual_seed(0)
    ach, x = ACH(16, 6, slot_order=slot_order), torch.randn(4, 16, 6, 6)
    ach.noise.zero_()
    ach.scorer.tau.fill_(0.01)  # the smallest: softmax is zero for all but a few channels
    scores = torch.linspace(-4, 4, 16)[torch.stack([torch.randperm(16) for _ in range(4)])]
    with torch.no_grad():
        assert torch.equal(ach._gumbel_gather(x, scores), gather_channels(x, ach.select(scores)))


def test_selection_differs_between_samples() -> None:
    torch.manual_seed(0)
    ach, x = ACH(16, 4).eval(), torch.randn(8, 16, 4, 4)
    with torch.no_grad():
        mixed = ach.bn(ach.pointwise(x))
        chosen = ach.select(ach.scorer(mixed))
        assert len({frozenset(row) for row in chosen.tolist()}) > 1
        y = ach(x)
        for sample, channels in enumerate(chosen.tolist()):
            q = [mixed[sample, channels[i]] * mixed[sample, channels[j]] for i in range(4) for j in range(i + 1, 4)]
            assert torch.equal(y[sample, 16:], ach.norm(torch.stack(q)[None])[0])
        # A batch is its samples one by one, whatever the others are.
        torch.testing.assert_close(y, torch.cat([ach(one[None]) for one in x]), rtol=1e-5, atol=1e-6)


def test_rank_order_follows_the_scores_and_channel_order_the_channels() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.7, 0.2], [5.0, 4.0, 3.0, 2.0, 6.0]])
    assert ACH(5, 3).select(scores).tolist() == [[1, 3, 2], [4, 0, 1]]
    assert ACH(5, 3, slot_order="channel").select(scores).tolist() == [[1, 2, 3], [0, 1, 4]]


def test_channel_order_holds_the_same_channels_sorted() -> None:
    torch.manual_seed(0)
    scores = torch.randn(50, 24)
    ranked, ordered = ACH(24, 8).select(scores), ACH(24, 8, slot_order="channel").select(scores)
    assert torch.equal(ranked.sort(dim=1).values, ordered)
    assert not torch.equal(ranked, ordered)


def test_ties_still_choose_distinct_channels_with_the_largest_scores() -> None:
    scores = torch.randint(0, 4, (64, 16), generator=torch.Generator().manual_seed(0)).float()
    chosen = ACH(16, 6).select(scores)
    assert all(len(set(row)) == 6 for row in chosen.tolist())
    assert torch.equal(scores.gather(1, chosen), scores.sort(dim=1, descending=True).values[:, :6])
    for row, values in zip(chosen.tolist(), scores, strict=True):  # the lower channel first
        assert row == sorted(range(16), key=lambda c: (-float(values[c]), c))[:6]


def test_frozen_selection_is_the_same_for_every_sample_and_asks_no_scorer() -> None:
    torch.manual_seed(0)
    ach, x = ACH(16, 4).eval(), torch.randn(3, 16, 4, 4)
    channels = torch.tensor([7, 2, 11, 5])
    ach.freeze(channels)
    asked: list[object] = []
    ach.scorer.register_forward_hook(lambda *_: asked.append(1))
    with torch.no_grad():
        mixed = ach.bn(ach.pointwise(x))
        i, j = pair_indices(4)
        wanted = ach.norm(mixed[:, channels[i]] * mixed[:, channels[j]])
        assert torch.equal(ach(x)[:, 16:], wanted)
        ach.training = True  # alone: its BatchNorm stays in eval, so X~ is the same
        assert torch.equal(ach(x)[:, 16:], wanted)
    assert asked == []


def test_freezing_the_choice_of_inference_changes_nothing() -> None:
    torch.manual_seed(0)
    ach, x = ACH(16, 4).eval(), torch.randn(1, 16, 4, 4)
    with torch.no_grad():
        wanted = ach(x)
        ach.freeze(ach.select(ach.scorer(ach.bn(ach.pointwise(x))))[0])
        assert torch.equal(ach(x), wanted)


@pytest.mark.parametrize("count", [3, 5])
def test_freezing_another_number_of_channels_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="expected 4 indices"):
        ACH(16, 4).freeze(torch.arange(count))


def test_frozen_channels_stay_out_of_the_state_dict() -> None:
    # Whether a selection is frozen is decided by the recipe, not by the weights.
    ach = ACH(16, 4)
    names = ach.state_dict().keys()
    ach.freeze(torch.arange(4))
    assert ach.state_dict().keys() == names
    assert {"scorer.tau", "scorer.gradient_norm", "scorer.stored_norm"} <= names


class Temperature:
    """Train a scorer for some steps, zeroing gradients before each forward pass, and keep what happened."""

    def __init__(self, scorer: ChannelScorer) -> None:
        self.scorer = scorer.train()
        self.norms: list[float] = []
        self.taus: list[float] = []

    def step(self, size: float) -> None:
        """One step whose gradient has the given `size`, up to the means of the input."""
        self.scorer.zero_grad()
        x = torch.randn(2, 8, 3, 3)
        scores = self.scorer(x)
        self.taus.append(float(self.scorer.tau))
        (scores.sum() * size).backward()
        self.scorer.step_temperature()
        assert self.scorer.weight.grad is not None
        self.norms.append(float(self.scorer.weight.grad.norm()))

    def expected(self, start: float) -> list[float]:
        """The written rule on the recorded norms: tau in the forward pass of every step."""
        taus, tau, stored = [], np.float32(start), None
        for previous in [None, *self.norms[:-1]]:
            if previous is not None:
                if stored is not None:
                    sign = 1 if stored <= previous else -1
                    tau = np.float32(min(max(tau * np.float32(1 + 0.005 * sign), 0.01), 4.0))
                stored = previous
            taus.append(float(tau))
        return taus


def test_the_temperature_follows_its_rule_exactly() -> None:
    torch.manual_seed(0)
    scorer = ChannelScorer()
    scorer.tau.fill_(1.0)
    run = Temperature(scorer)
    for size in (1, 2, 4, 3, 2, 1, 0.5, 3, 5, 1, 1, 2):
        run.step(size)
    assert run.taus == pytest.approx(run.expected(1.0), rel=1e-6)  # ten float32 roundings
    rises = [b > a for a, b in zip(run.taus, run.taus[1:], strict=False) if a != b]
    assert True in rises
    assert False in rises
    # Nothing moves before two norms are known.
    assert run.taus[0] == run.taus[1] == 1.0
    assert run.taus[2] != 1.0


@pytest.mark.parametrize(("start", "sizes", "end"), [(3.99, range(1, 12), 4.0), (0.0101, range(12, 0, -1), 0.01)])
def test_the_temperature_stays_in_its_range(start: float, sizes: range, end: float) -> None:
    scorer = ChannelScorer().train()
    scorer.tau.fill_(start)
    x = torch.ones(1, 8, 2, 2)
    for size in sizes:
        (scorer(x).sum() * size).backward()
        scorer.step_temperature()
        scorer.zero_grad()
    assert float(scorer.tau) == pytest.approx(end, rel=1e-7)


def test_a_gradient_that_overflowed_is_no_step_of_the_temperature() -> None:
    scorer = ChannelScorer()
    scorer.step_temperature()  # nor is one that never was
    assert scorer.gradient_norm.isnan()
    taus = []
    scorer.tau.fill_(1.0)
    for size in (1.0, torch.inf, 2.0):
        scorer.weight.grad = torch.full((1, 1, 5), size)
        scorer.step_temperature()
        taus.append(float(scorer.tau))
    assert taus == pytest.approx([1.0, 1.0, 1.005])


def test_inference_leaves_the_temperature_alone() -> None:
    scorer = ChannelScorer().train()
    x = torch.ones(1, 8, 2, 2)
    for size in (1, 2, 3):
        (scorer(x).sum() * size).backward()
        scorer.step_temperature()
    moved = copy.deepcopy(scorer.state_dict())
    scorer.eval()(x)
    with torch.no_grad():
        scorer.train()(x)
    assert all(torch.equal(tensor, scorer.state_dict()[name]) for name, tensor in moved.items())


@pytest.mark.parametrize("how", ["deepcopy", "state_dict"])
def test_a_copy_continues_the_temperature_and_leaves_the_original_alone(how: str) -> None:
    torch.manual_seed(0)
    whole, broken = ChannelScorer(), ChannelScorer()
    broken.load_state_dict(whole.state_dict())
    for scorer in (whole, broken):
        scorer.tau.fill_(1.0)
    sizes = [1, 2, 3, 2, 1, 4, 2]

    def train(scorer: ChannelScorer, sizes: list[int]) -> None:
        for size in sizes:
            scorer.zero_grad()
            (scorer.train()(torch.ones(1, 8, 2, 2)).sum() * size).backward()
            scorer.step_temperature()

    train(whole, sizes)
    train(broken, sizes[:4])
    if how == "deepcopy":
        continued = copy.deepcopy(broken)
    else:
        continued = ChannelScorer()
        continued.load_state_dict(broken.state_dict())
    at_the_break = float(broken.tau)
    train(continued, sizes[4:])
    assert float(continued.tau) == float(whole.tau) != 1.0
    assert torch.equal(continued.gradient_norm, whole.gradient_norm)
    assert float(broken.tau) == at_the_break


def test_autocast_chooses_as_float32_does_where_margins_allow() -> None:
    """X~ is rounded to bfloat16, half a step of 2^-8; its means and scores are not rounded further."""
    torch.manual_seed(0)
    ach, x = ACH(24, 8).eval(), torch.randn(64, 24, 14, 14)
    with torch.no_grad():
        mixed = ach.bn(ach.pointwise(x))
        exact = ach.scorer(mixed)
        with torch.autocast("cpu", torch.bfloat16):
            half = ach.bn(ach.pointwise(x))
            scores = ach.scorer(half)
        assert half.dtype == torch.bfloat16
        assert torch.equal(scores, ach.scorer(half.float()))
        error = float((scores - exact).abs().max())
        # Operands, weights and results of the convolution are rounded, each relative to the values at hand.
        assert error <= 3 * 2.0**-8 * float(mixed.abs().mean((2, 3)).max() * ach.scorer.weight.abs().sum())
    values = exact.sort(dim=1, descending=True).values
    sure = (values[:, 7] - values[:, 8]) > 2 * error
    assert int(sure.sum()) > 16
    chosen, wanted = (ach.select(s)[sure].sort(dim=1).values for s in (scores, exact))
    assert torch.equal(chosen, wanted)


@pytest.mark.parametrize("norm", ["dysoft", "batch_norm"])
def test_a_training_step_in_half_precision_is_finite_and_near(norm: Norm) -> None:
    torch.manual_seed(0)
    ach, x = ACH(16, 6, norm).train(), torch.randn(8, 16, 6, 6)
    ach.freeze(torch.arange(6))  # the choice aside: it may differ
    gradients = []
    for enabled in (False, True):
        ach.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = ach(x)
        assert out.dtype == torch.float32
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)))
        gradients.append(torch.cat([p.grad.flatten() for p in ach.parameters() if p.grad is not None]))
    error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert 0 < float(error) < 0.02
