from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hadaptive_q.train.distill import distillation


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(6, 5), torch.tensor([0, 1, 2, 0, 1, 2])


def networks() -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(1)
    return nn.Linear(5, 3), nn.Linear(5, 3)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_loss_is_its_formula(share: float, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    (teacher, student), (inputs, labels) = networks(), batch
    p, q = teacher(inputs).softmax(1), student(inputs).softmax(1)
    kl = (p * (p / q).log()).sum(1).mean()
    hard = F.cross_entropy(student(inputs), labels, label_smoothing=0.1)
    loss = distillation(teacher, share, 0.1)(student, inputs, labels)
    torch.testing.assert_close(loss, (1 - share) * hard + share * kl)


def test_only_the_student_learns(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    teacher, student = networks()
    distillation(teacher, 0.5, 0.0)(student, *batch).backward()
    assert teacher.weight.grad is None
    assert student.weight.grad is not None
    assert student.weight.grad.any()


def test_a_student_that_equals_its_teacher_has_nothing_to_learn(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    teacher, student = networks()
    student.load_state_dict(teacher.state_dict())
    loss = distillation(teacher, 1.0, 0.0)(student, *batch)
    loss.backward()
    assert float(loss) == pytest.approx(0, abs=1e-6)
    assert student.weight.grad is not None
    assert float(student.weight.grad.abs().max()) < 1e-6


def test_without_distillation_the_teacher_is_not_asked(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    class Absent(nn.Module):
        def forward(self, _: torch.Tensor) -> torch.Tensor:
            raise AssertionError("asked")

    _, student = networks()
    assert distillation(Absent(), 0.0, 0.0)(student, *batch).isfinite()
