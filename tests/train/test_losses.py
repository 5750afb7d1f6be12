from __future__ import annotations

from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hadaptive_q.recipe import FitConfig, MarginConfig, TrainConfig
from hadaptive_q.train.losses import feature_error, fit_loss, float_loss
from hadaptive_q.train.observe import Choice, Observed

SCORES = [torch.tensor([[0.05, 0.0, 0.3]])]
CHOICES = [Choice(1, "rank")]


class Seen(nn.Module):
    """A linear network that shows its logits, its hidden layer as the only feature, and the scores given."""

    def __init__(self, scores: list[Tensor]) -> None:
        super().__init__()
        self.hidden, self.classifier, self.scores = nn.Linear(5, 4), nn.Linear(4, 3), scores
        self.choices = CHOICES

    def forward(self, x: Tensor) -> Observed:
        hidden = self.hidden(x)
        return Observed(self.classifier(hidden), [hidden], self.scores)


class Absent(nn.Module):
    choices: ClassVar[list[Choice]] = []

    def forward(self, _: Tensor) -> Observed:
        raise AssertionError("asked")


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(6, 5), torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.fixture
def networks() -> tuple[Seen, Seen]:
    torch.manual_seed(1)
    return Seen(SCORES), Seen([torch.tensor([[0.05, 0.01, 0.08]])])


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
    # The teacher's first is the student's first, too, by 0.03 of the wanted 0.1.
    shortfall = 0.7
    wanted = (1 - share) * hard + share * kl + features * sum(errors) / 3 + margin * shortfall + 3.0
    config = fit(distill=share, distill_features=features, margin=MarginConfig(gap=0.1, weight=margin))
    loss = fit_loss(config, teacher, lambda: torch.tensor(3.0))(student, inputs, labels)
    torch.testing.assert_close(loss, wanted)


def test_the_float_loss_is_its_formula(batch: tuple[Tensor, Tensor], networks: tuple[Seen, Seen]) -> None:
    inputs, labels = batch
    config = TrainConfig(epochs=1, lr=0.1, label_smoothing=0.2, margin=MarginConfig(gap=0.1, weight=2.0))
    hard = F.cross_entropy(networks[1](inputs).logits, labels, label_smoothing=0.2)
    loss = float_loss(config, networks[1])(networks[1], inputs, labels)  # type: ignore[arg-type]
    torch.testing.assert_close(loss, hard + 2.0 * 0.7)


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
    student.scores = teacher.scores
    loss = fit_loss(fit(distill=1.0, distill_features=1.0), teacher)(student, *batch)
    loss.backward()
    assert float(loss) == pytest.approx(0, abs=1e-6)
    assert student.hidden.weight.grad is not None
    assert float(student.hidden.weight.grad.abs().max()) < 1e-6


def test_without_distillation_the_teacher_is_not_asked(
    batch: tuple[Tensor, Tensor], networks: tuple[Seen, Seen]
) -> None:
    assert fit_loss(fit(distill=0.0), Absent())(networks[0], *batch).isfinite()


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_feature_error_is_relative(scale: float) -> None:
    def seen(value: float) -> Observed:
        return Observed(torch.full((2, 3), value * scale), [torch.full((2, 3, 1, 1), value * scale)], [])

    torch.testing.assert_close(feature_error(seen(1.0), seen(0.9)), torch.tensor(0.01))
