"""Losses of both trainings: the float network's, and the fine-tuning under quantization."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hadaptive_q.recipe import FitConfig, MarginConfig, TrainConfig
from hadaptive_q.train.loop import Loss
from hadaptive_q.train.observe import Observed


def float_loss(config: TrainConfig) -> Loss:
    """Return ``cross_entropy + weight * margin_shortfall`` for an observed network."""

    def loss(student: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        seen: Observed = student(inputs)
        hard = F.cross_entropy(seen.logits, labels, label_smoothing=config.label_smoothing)
        return _with_margin(hard, seen, config.margin)

    return loss


def fit_loss(config: FitConfig, teacher: nn.Module, penalty: Callable[[], Tensor] | None = None) -> Loss:
    """Return the fine-tuning loss for an observed student and an observed `teacher`, which sees the very same inputs.

    Formula: ``(1 - d) CE + d KL(teacher || student) + f feature_error + m margin_shortfall + penalty()`` with
    `d = distill`, `f = distill_features` and `m = margin.weight`; a term of weight 0 costs nothing.
    Source of the second term: Hinton et al., arXiv 1503.02531, at temperature 1.
    """

    def loss(student: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        seen: Observed = student(inputs)
        total = seen.logits.new_zeros(())
        if config.distill < 1:
            hard = F.cross_entropy(seen.logits, labels, label_smoothing=config.label_smoothing)
            total = total + (1 - config.distill) * hard
        if config.distill > 0 or config.distill_features > 0:
            with torch.no_grad():
                target: Observed = teacher(inputs)
            total = total + config.distill * _divergence(target.logits, seen.logits)
            if config.distill_features > 0:
                total = total + config.distill_features * feature_error(target, seen)
        total = _with_margin(total, seen, config.margin)
        return total + penalty() if penalty else total

    return loss


def feature_error(target: Observed, seen: Observed) -> Tensor:
    """Return the noise-to-signal ratio ``|s - t|^2 / |t|^2``, mean over the blocks' outputs, the logits and the scores.

    A student with frozen selections has no scores, and is not asked for them.
    """
    scores = zip(target.scores, seen.scores, strict=True) if seen.scores else ()
    pairs = [*zip(target.features, seen.features, strict=True), (target.logits, seen.logits), *scores]
    return torch.stack([(s - t).square().sum() / t.square().sum() for t, s in pairs]).mean()


def margin_shortfall(gaps: list[Tensor], wanted: float) -> Tensor:
    """Return by how much gaps `(B, K)` fall short of `wanted`: ``sum_k max(0, 1 - gap_k / wanted)``, mean over images
    and ACH modules; 0 where there are none.

    A sum, because every channel that crowds the line between chosen and refused has to leave it.
    """
    if not gaps:
        return torch.zeros(())
    return torch.stack([F.relu(1 - gap / wanted).sum(dim=1).mean() for gap in gaps]).mean()


def _divergence(target: Tensor, logits: Tensor) -> Tensor:
    return F.kl_div(logits.log_softmax(1), target.log_softmax(1), reduction="batchmean", log_target=True)


def _with_margin(loss: Tensor, seen: Observed, margin: MarginConfig) -> Tensor:
    return loss + margin.weight * margin_shortfall(seen.gaps, margin.gap) if margin.weight and seen.gaps else loss
