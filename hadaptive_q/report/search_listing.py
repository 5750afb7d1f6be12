"""A search as text: the table of layers, then what the choice costs."""

from __future__ import annotations

from math import log10

from hadaptive_q.report.search_record import SearchRecord


def search_listing(record: SearchRecord) -> str:
    """Return the layers in the order of the data, and the figures of the choice, for a terminal."""
    width = max(len(layer.layer) for layer in record.layers)
    lines = [f"{'layer':{width}}  {'bytes saved':>11}  {'sensitivity':>11}  {'instructions':>12}  bits"]
    lines += [
        f"{layer.layer:{width}}  {layer.bytes_saved:>11,}  {layer.sensitivity:>11.3e}"
        f"  {_signed(layer.instructions_added):>12}  {layer.bits:>4}"
        for layer in record.layers
    ]
    four = sum(layer.bits == 4 for layer in record.layers)
    lines += [
        f"{four} of {len(record.layers)} layers in 4 bits: {record.pte_bytes:,} bytes"
        f" (predicted {record.predicted_bytes:,}; int8 {record.int8_bytes:,}, smallest {record.smallest_bytes:,})",
        f"noise on the int8 logits: {_level(record.predicted_noise)} as the sum of single layers,"
        f" {_level(record.joint_noise)} together, {_level(record.program_noise)} calibrated anew",
        f"top-1 {record.top1:.2f} % on {record.samples} validation images"
        f" (float {record.float_top1:.2f} %, int8 {record.int8_top1:.2f} %)",
    ]
    counts = record.instructions
    if counts is None:
        lines.append(f"instructions: none counted, {record.instructions_absent}")
    else:
        lines.append(
            f"{counts.chosen:,} instructions on {counts.core} (predicted {counts.predicted:,};"
            f" int8 {counts.int8:,}, smallest {counts.smallest:,})"
        )
    return "\n".join(lines)


def _signed(count: int | None) -> str:
    return "-" if count is None else f"{count:+,}"


def _level(noise: float) -> str:
    return f"{10 * log10(noise):.1f} dB" if noise else "none"
