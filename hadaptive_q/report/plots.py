"""Plots: those of a report as SVG text, that of a search as PNG."""

from __future__ import annotations

import io
import math
import re
import textwrap

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hadaptive_q.report.explanation import Explanation
from hadaptive_q.report.listing import tensor_label
from hadaptive_q.report.record import LayerRecord, Report
from hadaptive_q.report.search_record import SearchRecord

FLOAT_COLOR, INT8_COLOR, WARM, GRID = "#8a8f98", "#2f6fde", "#d9822b", "#d8dce2"
WIDTH = 9.0
BLAMED = 20


def plots(report: Report, explanation: Explanation | None = None) -> dict[str, str]:
    """Return the plots by name, each one `<svg>` element."""
    drawn = {"summary": _summary(report), "layers": _layers(report.layers)}
    if report.ach:
        drawn["ranges"] = _ranges(report)
    return drawn | ({"blame": _blame(explanation)} if explanation else {})


def svg(figure: Figure) -> str:
    """Return `figure` as one `<svg>` element that fits its page."""
    buffer = io.StringIO()
    # No date and a fixed salt for identifiers: the same report gives the same bytes.
    with rc_context({"svg.hashsalt": "hadaptive-q"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text[text.index("<svg") :], count=1)


def blank(height: float) -> Figure:
    """Return a figure as wide as a page and so many inches high."""
    return Figure(figsize=(WIDTH, height), layout="constrained")


def _summary(report: Report) -> str:
    figure = blank(2.4)
    size, latency, accuracy = report.size, report.latency, report.accuracy
    panels = (
        ("Top-1, %", accuracy.float_top1, accuracy.pte_top1, "{:.2f}"),
        ("File, MB", size.float_pte_bytes / 1e6, size.pte_bytes / 1e6, "{:.2f}"),
        ("Latency on this host, ms", latency.float_host_ms_median, latency.host_ms_median, "{:.2f}"),
    )
    for axis, (title, reference, quantized, form) in zip(figure.subplots(1, 3), panels, strict=True):
        bars = axis.barh(["float", "int8"], [reference, quantized], color=[FLOAT_COLOR, INT8_COLOR], height=0.6)
        axis.bar_label(bars, fmt=form, padding=4, fontsize=9)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlim(0, max(reference, quantized) * 1.3)
        axis.invert_yaxis()
        axis.xaxis.set_visible(False)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    return svg(figure)


def _layers(layers: list[LayerRecord]) -> str:
    figure = blank(3.4)
    axis = figure.subplots()
    values = [layer.sqnr_db if math.isfinite(layer.sqnr_db) else math.nan for layer in layers]
    colors = [WARM if value < 10 else INT8_COLOR for value in values]
    axis.bar(range(len(values)), values, color=colors, width=0.8)
    # One label where the block changes: a hundred names are not readable.
    blocks = [_block(layer.origin) for layer in layers]
    starts = [i for i, block in enumerate(blocks) if i == 0 or block != blocks[i - 1]]
    axis.set_xticks(starts, [blocks[i] for i in starts], rotation=60, ha="right", fontsize=7)
    axis.set_ylabel("SQNR to float, dB")
    axis.set_title("Every quantized tensor, in the order of the data (orange: below 10 dB)", fontsize=10, loc="left")
    axis.grid(axis="y", color=GRID)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    return svg(figure)


def _block(origin: str) -> str:
    return ".".join(origin.split(".")[:2]) if origin.startswith("blocks") else origin.split(".")[0]


def _ranges(report: Report) -> str:
    figure = blank(3.0)
    axis = figure.subplots()
    series = (
        ("X~", [a.mixed_max for a in report.ach], FLOAT_COLOR),
        ("product", [a.product_max for a in report.ach], WARM),
        ("after the norm", [a.normed_max for a in report.ach], INT8_COLOR),
    )
    for shift, (label, values, color) in zip((-0.27, 0.0, 0.27), series, strict=True):
        bars = axis.bar([i + shift for i in range(len(values))], values, width=0.25, label=label, color=color)
        axis.bar_label(bars, fmt="{:.3g}", fontsize=7, padding=2)
    axis.set_yscale("log")
    axis.margins(y=0.2)
    axis.set_xticks(range(len(report.ach)), [a.name.removesuffix(".expansion") for a in report.ach], fontsize=8)
    axis.set_ylabel("largest magnitude")
    axis.set_title("Range of X~, of the products, and of the products after their norm", fontsize=10, loc="left")
    axis.legend(fontsize=8, frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.8, 1.0))
    axis.spines[["top", "right"]].set_visible(False)
    return svg(figure)


def _blame(explanation: Explanation) -> str:
    tensors = explanation.tensors[:BLAMED]
    panels = [("Alone, % of all noise", [100 * t.blame.share for t in tensors], FLOAT_COLOR, "{:.1f}")]
    if explanation.selects:
        # On an axis of its own: next to the noise of swapped channels it may be a hairline.
        panels.append(("Selections held, %", [100 * t.blame.held_share for t in tensors], INT8_COLOR, "{:.2f}"))
    panels.append(("Gained without it, dB", [t.blame.gained_db for t in tensors], WARM, "{:+.2f}"))
    figure = blank(0.7 + 0.24 * len(tensors))
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (title, values, color, form) in zip(axes, panels, strict=True):
        axis.bar_label(axis.barh(range(len(values)), values, color=color, height=0.7), fmt=form, fontsize=7, padding=3)
        axis.set_title(title, fontsize=9, loc="left")
        axis.margins(x=0.3)
        axis.locator_params(axis="x", nbins=5)
        axis.tick_params(axis="x", labelsize=7)
        axis.tick_params(axis="y", length=0)
        axis.axvline(0, color=FLOAT_COLOR, linewidth=0.8)
        axis.grid(axis="x", color=GRID)
        axis.set_axisbelow(True)
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes[0].set_yticks(range(len(tensors)), [tensor_label(tensor) for tensor in tensors], fontsize=7)
    axes[0].set_ylim(len(tensors) - 0.5, -0.5)
    return svg(figure)


def pareto_png(record: SearchRecord) -> bytes:
    """Return a PNG of what every file size costs: noise, accuracy and instructions, predicted and as measured."""
    figure = blank(8.0)
    axes = figure.subplots(3, 1, sharex=True)
    for draw, axis in zip((_noise, _accuracy, _instructions), axes, strict=True):
        draw(axis, record)
        axis.grid(color=GRID)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, frameon=False)
    axes[0].set_title(f"{record.model} on {record.data}: what a size costs", fontsize=10, loc="left")
    axes[-1].set_xlabel("file, MB")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def _noise(axis: Axes, record: SearchRecord) -> None:
    # Nothing in 4 bits adds no noise, which a logarithm cannot show.
    front = [point for point in record.front if point.noise > 0]
    sizes, noises = [point.pte_bytes / 1e6 for point in front], [point.noise for point in front]
    axis.plot(sizes, noises, color=FLOAT_COLOR, marker=".", label="least sum of single noises")
    measured = [("4-bit weights of the choice, together", record.joint_noise, INT8_COLOR, "o")]
    measured.append(("the choice, calibrated anew", record.program_noise, WARM, "x"))
    for label, noise, color, marker in measured:
        if noise > 0:
            axis.plot([record.pte_bytes / 1e6], [noise], color=color, marker=marker, linestyle="", label=label)
    axis.set_yscale("log")
    axis.set_ylabel("noise on the int8 logits\nover their power")


def _accuracy(axis: Axes, record: SearchRecord) -> None:
    tried = [(point.pte_bytes / 1e6, point.top1) for point in record.front if point.top1 is not None]
    axis.plot(*zip(*tried, strict=True), color=FLOAT_COLOR, marker=".", label="with the ranges of 8-bit weights")
    axis.plot([record.pte_bytes / 1e6], [record.top1], color=WARM, marker="x", linestyle="", label="the choice")
    error = math.sqrt(record.float_top1 * (100 - record.float_top1) / record.samples)
    axis.axhspan(record.float_top1 - error, record.float_top1 + error, color=GRID, alpha=0.6, linewidth=0)
    axis.axhline(record.float_top1, color=INT8_COLOR, linewidth=0.8, label="float, and its standard error")
    axis.set_ylabel(f"top-1, %, of {record.samples} images")


def _instructions(axis: Axes, record: SearchRecord) -> None:
    counts = record.instructions
    if counts is None:
        said = textwrap.fill(f"none counted: {record.instructions_absent}", 90)
        axis.text(0.5, 0.5, said, transform=axis.transAxes, ha="center", fontsize=9)
        axis.set_ylabel("instructions")
        axis.set_yticks([])
        return
    points = [(point.pte_bytes / 1e6, point.instructions / 1e6) for point in record.front if point.instructions]
    axis.plot(*zip(*points, strict=True), color=FLOAT_COLOR, marker=".", label="sum of what single layers add")
    for label, size, count, color, marker in (
        ("none in 4 bits, counted", record.int8_bytes, counts.int8, INT8_COLOR, "o"),
        ("all in 4 bits, counted", record.smallest_bytes, counts.smallest, INT8_COLOR, "s"),
        ("the choice, counted", record.pte_bytes, counts.chosen, WARM, "x"),
    ):
        axis.plot([size / 1e6], [count / 1e6], color=color, marker=marker, linestyle="", label=label)
    axis.set_ylabel(f"million instructions\non {counts.core}")
