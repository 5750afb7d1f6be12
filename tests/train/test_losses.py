from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hadaptive_q.recipe import FitConfig, MarginConfig, TrainConfig
from hadaptive_q.train.losses import feature_error, fit_loss, float_loss, margin_shortfall
from hadaptive_q.train.observe import Observed

GAPS = [torch.tensor([[0.05, 0.2]]), torch.tensor([[0.0], [0.1]])]


class Seen(nn.Module):
    """A linear network that shows its logits, given gaps, and its hidden layer as the only feature."""

    def __init__(self, gaps: list[Tensor]) -> None:
        super().__init__()
        self.hidden, self.classifier, self.gaps = nn.Linear(5, 4), nn.Linear(4, 3), gaps

    def forward(self, x: Tensor) -> Observed:
        hidden = self.hidden(x)
        return Observed(self.classifier(hidden), [hidden[:, :2]], self.gaps, [hidden])


class Absent(nn.Module):
    def forward(self, _: Tensor) -> Observed:
        raise AssertionError("asked")


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(6, 5), torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.fixture
def networks() -> tuple[Seen, Seen]:
    torch.manual_seed(1)
    return Seen(GAPS), Seen(GAPS)


def fit(**fields: object) -> FitConfig:
    return FitConfig.model_validate({"epochs": 1, "lr": 0.1, "label_smoothing": 0.1, **fields})


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("features", [0.0, 2.0])
@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_the_loss_is_its_formula(
    share: float, features: float, margin: float, batch: tuple[Tensor, Tensor], networks: tuple[Seen, Seen]
) -> None:
    (teacher, student), (inputs, labels) = networks, batch
    target, seen = teacher(inputs), student(inputs)
    p, q = target.logits.softmax(1), seen.logits.softmax(1)
    kl = (p * (p / q).log()).sum(1).mean()
    hard = F.cross_entropy(seen.logits, labels, label_smoothing=0.1)
    errors = [
        ((s - t) ** 2).sum() / (t**2).sum()
        for t, s in zip(
            (target.features[0], target.logits, target.scores[0]),
            (seen.features[0], seen.logits, seen.scores[0]),
            strict=True,
        )
    ]
    # Of the wanted 0.1: half and nothing is missing in the first ACH, all and nothing for the second one's two images.
    shortfall = (0.5 + 1.0 / 2) / 2
    wanted = (1 - share) * hard + share * kl + features * sum(errors) / 3 + margin * shortfall + 3.0
    config = fit(distill=share, distill_features=features, margin=MarginConfig(gap=0.1, weight=margin))
    loss = fit_loss(config, teacher, lambda: torch.tensor(3.0))(student, inputs, labels)
    torch.testing.assert_close(loss, wanted)


def test_the_float_loss_is_its_formula(batch: tuple[Tensor, Tensor], networks: tuple[Seen, Seen]) -> None:
    inputs, labels = batch
    config = TrainConfig(epochs=1, lr=0.1, label_smoothing=0.2, margin=MarginConfig(gap=0.1, weight=2.0))
    hard = F.cross_entropy(networks[0](inputs).logits, labels, label_smoothing=0.2)
    torch.testing.assert_close(float_loss(config)(networks[0], inputs, labels), hard + 2.0 * 0.5)


def test_only_the_student_learns(batch: tuple[Tensor, Tensor], networks: tuple[Seen, Seen]) -> None:
    teacher, student = networks
    fit_loss(fit(distill=0.5, distill_features=1.0), teacher)(student, *batch).backward()
    assert teacher.hidden.weight.grad is None
    assert student.hidden.weight.grad is not None
    assert student.hidden.weight.grad.any()


def test_a_student_that_equals_its_teacher_has_nothing_to_learn(
    batch: tuple[Tensor, Tensor], networks: tuple[Seen, Seen]
) -> None:
    teacher, student = networks
    student.load_state_dict(teacher.state_dict())
    loss = fit_loss(fit(distill=1.0, distill_features=1.0), teacher)(student, *batch)
    loss.backward()
    assert float(loss) == pytest.approx(0, abs=1e-6)
    assert student.hidden.weight.grad is not None
    assert float(student.hidden.weight.grad.abs().max()) < 1e-6


def test_without_distillation_the_teacher_is_not_asked(
    batch: tuple[Tensor, Tensor], networks: tuple[Seen, Seen]
) -> None:
    assert fit_loss(fit(distill=0.0), Absent())(networks[0], *batch).isfinite()


def test_no_choice_is_no_shortfall() -> None:
    assert float(margin_shortfall([], 0.1)) == 0


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_feature_error_is_relative(scale: float) -> None:
    def seen(value: float) -> Observed:
        return Observed(torch.full((2, 3), value * scale), [], [], [torch.full((2, 3, 1, 1), value * scale)])

    torch.testing.assert_close(feature_error(seen(1.0), seen(0.9)), torch.tensor(0.01))


def test_a_step_along_the_margin_widens_the_gap() -> None:
    scores = torch.tensor([[0.30, 0.31, 0.0]], requires_grad=True)
    top = scores.topk(2, dim=1).values
    gap: Callable[[Tensor], Tensor] = lambda t: t[:, :1] - t[:, 1:]  # noqa: E731
    margin_shortfall([gap(top)], 0.1).backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [[pytest.approx(10.0), pytest.approx(-10.0), 0.0]]
