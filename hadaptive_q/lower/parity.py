"""How far apart two outputs for the same images are: the written file, its quantized program, the float network."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Parity:
    """`top1_agreement`: share of images with the same first class; `changed_fraction`: share of logits whose code
    differs; `max_codes`: the largest difference in codes (LSB); `sqnr_db`: logits, the second as the noisy one."""

    top1_agreement: float
    changed_fraction: float
    max_codes: int
    sqnr_db: float


def compare(reference: Tensor, other: Tensor, scale: float) -> Parity:
    """Compare logits `(N, classes)`; `scale` is the step of one output code."""
    codes = ((other.double() - reference.double()) / scale).round().abs()
    return Parity(
        top1_agreement=agreement(reference, other),
        changed_fraction=float((codes > 0).double().mean()),
        max_codes=int(codes.max()),
        sqnr_db=sqnr_db(reference, other),
    )


def agreement(a: Tensor, b: Tensor) -> float:
    """Return the share of rows with the same largest entry."""
    return float((a.argmax(dim=1) == b.argmax(dim=1)).double().mean())


def top1(logits: Tensor, labels: Tensor) -> float:
    """Return top-1 accuracy in percent."""
    return float((logits.argmax(dim=1) == labels).double().mean()) * 100


def topk(logits: Tensor, labels: Tensor, k: int) -> float:
    """Return top-k accuracy in percent; `k` is cut to the number of classes."""
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return float((best == labels[:, None]).any(dim=1).double().mean()) * 100


def sqnr_db(signal: Tensor, noisy: Tensor) -> float:
    """Return ``10 log10(sum x^2 / sum (x - y)^2)`` in dB; infinite where both are equal."""
    noise = float((signal.double() - noisy.double()).square().sum())
    power = float(signal.double().square().sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(power / noise) if power else -math.inf


def output_scale(graph: torch.fx.GraphModule) -> float:
    """Return the scale of the program's quantized output. Raises ValueError where the output is not quantized."""
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    last = output.args[0][0] if isinstance(output.args[0], tuple | list) else output.args[0]
    if "dequantize_per_tensor" not in str(last.target):
        raise ValueError(f"the output comes from {last.target}, not from a dequantize")
    return float(last.args[1])
