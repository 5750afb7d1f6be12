"""An explanation as plain text for a terminal: aligned columns, the most blamed first, names last."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from hadaptive_q.report.explanation import AchExplanation, Explanation, FloatIsland, RoundedTensor

WIDTH = 120
SHOWN = 30


def listing(explanation: Explanation, whole: bool) -> str:
    """Return `explanation` as text, `whole` or with the most blamed tensors only."""
    tensors = explanation.tensors if whole else explanation.tensors[:SHOWN]
    parts = [_summary(explanation)]
    if tensors:
        parts.append(_tensors(tensors, explanation.tensors[len(tensors) :], explanation.selects))
    if explanation.ach:
        parts.append(_ach(explanation.ach))
    if explanation.float_islands:
        parts.append(_islands(explanation.float_islands))
    return "\n\n".join(parts)


def _summary(explanation: Explanation) -> str:
    logits = explanation.logits
    run = f"{explanation.model}, recipe {explanation.recipe}, {explanation.data}"
    lines = [
        f"{run}: {explanation.samples} validation images",
        f"{logits.program_to_float_db:5.1f} dB  logit SQNR of the quantized program to the float network",
        f"{logits.parameters_db:5.1f} dB  of its parameters before rounding (trained, biases on a grid), to the same",
        f"{logits.rounding_db:5.1f} dB  of rounding alone, to those parameters",
    ]
    if explanation.selects:
        lines.append(
            f"{logits.held_db:5.1f} dB  of rounding alone while every image keeps its channels:"
            f" {100 * explanation.swapped_share:.0f} % of the noise comes with swapped channels"
        )
    return "\n".join(lines)


def tensor_label(tensor: RoundedTensor) -> str:
    """Return a name for people: layer and tensor, without saying the layer twice."""
    # Every weight carries its norm by now; the name in the record says so, here it takes room.
    name = tensor.name.removeprefix(tensor.layer.replace(".", "_") + "_").replace("_folded", "")
    return f"{tensor.layer}: {name}"


def _tensors(tensors: Sequence[RoundedTensor], rest: Sequence[RoundedTensor], selects: bool) -> str:
    head = (
        *("share", "held", "alone", "gained", "SQNR", "clip"),
        *("low", "high", "scale", "zero", "layer: tensor"),
    )
    rows = [
        (
            f"{100 * t.blame.share:.1f}",
            f"{100 * t.blame.held_share:.2f}",
            f"{t.blame.alone_db:.1f}",
            f"{t.blame.gained_db:+.2f}",
            f"{t.sqnr_db:.1f}",
            f"{100 * t.clipped:.2f}",
            f"{t.low:.3g}",
            f"{t.high:.3g}",
            f"{t.scale:.1e}",
            f"{t.zero_point}" if t.kind == "activation" else "",
            tensor_label(t),
        )
        for t in tensors
    ]
    table = [row if selects else (row[0], *row[2:]) for row in (head, *rows)]
    own = "every run selects channels by its own scores, so a rounding answers for those it swaps"
    held = f" ({own}; held: while every image keeps its channels)" if selects else ""
    text = _filled(
        f"Share: noise of the logits where this tensor alone is rounded, in % of the noise of all{held}."
        " Alone: the same as SQNR in dB. Gained: SQNR in dB by rounding all but it. SQNR: of the tensor itself. Clip:"
        " values beyond the codes, in %. Low and high: in float. Activations are int8 per tensor; weights int8 per"
        " output channel, symmetric, shown with their largest scale."
    )
    lines = [text, *aligned(table)]
    if rest:
        lines.append(
            f"{len(rest)} more, each at most {100 * rest[0].blame.share:.1f} %: --layer NAME or --json shows them"
        )
    return "\n".join(lines)


def _ach(achs: Sequence[AchExplanation]) -> str:
    head = (
        *("sa*sb/so", "operand", "product", "output", "set %", "rank %", "gap", "error"),
        *("tau", "slope", "|b| max", "selection", "ACH"),
    )
    rows = [
        (
            f"{a.scale_ratio:.3f}",
            *(f"{db:.1f}" for db in (a.operand_sqnr_db, a.product_sqnr_db, a.output_sqnr_db)),
            *(f"{100 * rate:.1f}" for rate in (a.flip_rate, a.rank_flip_rate)),
            *("" if value is None else f"{value:.3f}" for value in (a.rank_gap, a.score_error)),
            f"{a.tau:.2f}",
            "" if a.slope is None else f"{a.slope:.3f}",
            f"{a.bias_max:.3f}",
            a.selection,
            a.name,
        )
        for a in achs
    ]
    text = _filled(
        "ACH: operand scales multiplied, over the output's scale; SQNR in dB to the float network; channels selected"
        " that float does not (set) and slots with another channel (rank); median gap of neighbouring ranks and median"
        " error of the scores, in spreads of the scores; temperature, DySoft's slope and the norm's largest bias in"
        " the float network."
    )
    return "\n".join([text, *aligned([head, *rows])])


def _islands(islands: Sequence[FloatIsland]) -> str:
    lines = ["fp32 islands, between dequantize and quantize:"]
    for island in islands:
        operators = ", ".join(name if count == 1 else f"{name} {count}x" for name, count in island.operators.items())
        lines += textwrap.wrap(f"{island.layer}: {operators}", WIDTH, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)


def _filled(text: str) -> str:
    return "\n".join(textwrap.wrap(text, WIDTH))


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return `rows` with every column but the last, a name, right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for *figures, name in rows:
        lines.append("  ".join([*(f"{text:>{width}}" for text, width in zip(figures, widths, strict=False)), name]))
    return lines
