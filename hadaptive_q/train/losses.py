"""Losses of both trainings: the float network's, and the fine-tuning under quantization."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hadaptive_q.recipe import FitConfig, TrainConfig
from hadaptive_q.train.loop import Loss
from hadaptive_q.train.margin import margin_shortfall
from hadaptive_q.train.observe import Observed, ObservedModel
from hadaptive_q.train.together import mean


def float_loss(config: TrainConfig, student: ObservedModel) -> Loss:
    """Return ``cross_entropy + m margin_shortfall`` for the observed network `student`, `m = margin.weight`.

    The margin is that of its own selections.
    """
    choices, margin = student.choices, config.margin

    def loss(student: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        seen: Observed = student(inputs)
        hard = F.cross_entropy(seen.logits, labels, label_smoothing=config.label_smoothing)
        if not margin.weight:
            return hard
        wanted = [scores.detach() for scores in seen.scores]
        return hard + margin.weight * margin_shortfall(seen.scores, wanted, choices, margin.gap)

    return loss


def fit_loss(config: FitConfig, teacher: ObservedModel, penalty: Callable[[], Tensor] | None = None) -> Loss:
    """Return the fine-tuning loss for an observed student and its observed `teacher`, which sees the very same inputs.

    Formula: ``(1 - d) CE + d KL(teacher || student) + f feature_error + m margin_shortfall + penalty()`` with
    `d = distill`, `f = distill_features` and `m = margin.weight`; a term of weight 0 costs nothing. The margin is that
    by which the student decides for the teacher's selections.
    Source of the second term: Hinton et al., arXiv 1503.02531, at temperature 1.
    """
    margin = config.margin
    asked = config.distill > 0 or config.distill_features > 0 or margin.weight > 0

    def loss(student: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        seen: Observed = student(inputs)
        total = seen.logits.new_zeros(())
        if config.distill < 1:
            hard = F.cross_entropy(seen.logits, labels, label_smoothing=config.label_smoothing)
            total = total + (1 - config.distill) * hard
        if asked:
            with torch.no_grad():
                target: Observed = teacher(inputs)
        if config.distill > 0:
            total = total + config.distill * _divergence(target.logits, seen.logits)
        if config.distill_features > 0:
            total = total + config.distill_features * feature_error(target, seen)
        if margin.weight > 0 and seen.scores:
            shortfall = margin_shortfall(seen.scores, target.scores, teacher.choices, margin.gap)
            total = total + margin.weight * shortfall
        return total + penalty() if penalty else total

    return loss


def feature_error(target: Observed, seen: Observed) -> Tensor:
    """Return the noise-to-signal ratio ``|s - t|^2 / |t|^2``, mean over the blocks' outputs, the logits and the scores.

    A student with frozen selections has no scores, and is not asked for them.
    """
    scores = zip(target.scores, seen.scores, strict=True) if seen.scores else ()
    pairs = [*zip(target.features, seen.features, strict=True), (target.logits, seen.logits), *scores]
    return torch.stack([(s - t).square().sum() / mean(t.square().sum()) for t, s in pairs]).mean()


def _divergence(target: Tensor, logits: Tensor) -> Tensor:
    return F.kl_div(logits.log_softmax(1), target.log_softmax(1), reduction="batchmean", log_target=True)
