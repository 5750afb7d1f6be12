"""A comparison as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from hadaptive_q.report.comparison import ComparedModel, Comparison, fronts
from hadaptive_q.report.listing import aligned


def comparison_listing(record: Comparison) -> str:
    """Return two tables of `record`, of what the models answer and of what they cost, and what failed."""
    return "\n".join(_lines(record))


def _lines(record: Comparison) -> Iterator[str]:
    models = record.models
    yield f"{record.data}, {models[0].accuracy.samples} validation images"
    yield from aligned([("float", "top-1", "drop, 95 %", "= float", "SQNR", "recipe", "model"), *map(_answers, models)])
    yield ""
    head = ("params", "MACs", "bytes", "of float", "instr.", "of float", "ms here", "ratio", "of float", "outside")
    yield from aligned([(*head, "model"), *map(_costs, models)])
    yield "ratio: of the milliseconds to the first model's, all files in alternation; outside: operators of no delegate"
    if record.instructions_absent:
        yield f"instructions: none counted, {record.instructions_absent}"
    else:
        yield f"instructions: millions on an emulated {record.core}"
    for kind, best in fronts(record).items():
        yield f"front of accuracy and {kind}: {', '.join(m.name for m in best)}"
    for failure in record.failed:
        yield f"{failure.name} failed: {failure.error}"


def _answers(m: ComparedModel) -> tuple[str, ...]:
    drop = f"{m.drop.points:+.2f} ({m.drop.low:+.2f} to {m.drop.high:+.2f})"
    same, sqnr = f"{100 * m.float_agreement:.2f} %", f"{m.float_sqnr_db:.1f} dB"
    return f"{m.accuracy.float_top1:.2f}", f"{m.accuracy.pte_top1:.2f}", drop, same, sqnr, m.recipe, m.name


def _costs(m: ComparedModel) -> tuple[str, ...]:
    counts = m.instructions
    return (
        f"{m.params:,}",
        f"{m.macs / 1e6:.1f} M",
        f"{m.pte_bytes:,}",
        f"{m.pte_bytes / m.float_pte_bytes:.3f}",
        f"{counts.pte / 1e6:.2f}" if counts else "-",
        f"{counts.pte / counts.float_pte:.3f}" if counts else "-",
        f"{m.latency.host_ms_median:.3f}",
        f"{m.latency_ratio:.3f}",
        f"{m.latency.host_ms_median / m.latency.float_host_ms_median:.3f}",
        f"{len(m.portable_ops)}",
        m.name,
    )
