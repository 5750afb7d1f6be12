"""Losses of the fine-tuning under quantization."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hadaptive_q.train.loop import Loss


def distillation(teacher: nn.Module, share: float, label_smoothing: float) -> Loss:
    """Return ``(1 - share) * cross_entropy + share * KL(teacher || student)``.

    The teacher sees the very inputs the student sees. Source: Hinton et al., arXiv 1503.02531, at temperature 1.
    """

    def loss(student: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        logits = student(inputs)
        hard = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        if share == 0:
            return hard
        with torch.no_grad():
            target = teacher(inputs).log_softmax(dim=1)
        soft = F.kl_div(logits.log_softmax(dim=1), target, reduction="batchmean", log_target=True)
        return (1 - share) * hard + share * soft

    return loss
