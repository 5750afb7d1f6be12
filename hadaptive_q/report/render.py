"""The pages of a run and of a comparison from their records."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from hadaptive_q.atomic import write_text
from hadaptive_q.report.comparison import Comparison, costs, fronts
from hadaptive_q.report.explanation import Explanation
from hadaptive_q.report.front_plot import front_plot
from hadaptive_q.report.listing import tensor_label
from hadaptive_q.report.plots import plots
from hadaptive_q.report.record import Report


def pages() -> Environment:
    """Return the templates with what they call."""
    environment = Environment(
        loader=PackageLoader("hadaptive_q.report"),
        # Names come from users' folders and class names: escaped in HTML, plain in Markdown.
        autoescape=lambda name: bool(name and ".html" in name),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["mb"] = lambda count: f"{count / 1e6:.3f} MB"
    environment.filters["counted"] = _counted
    environment.filters["label"] = tensor_label
    return environment


def write_report_pages(report: Report, folder: Path, explanation: Explanation | None = None) -> None:
    """Write both pages of `report` into `folder`, with who is to blame where an `explanation` was made."""
    environment = pages()
    weakest = sorted(report.layers, key=lambda layer: layer.sqnr_db)[:10]
    shown = {"report": report, "weakest": weakest, "explanation": explanation}
    write_text(folder / "report.md", environment.get_template("report.md.j2").render(shown))
    page = environment.get_template("report.html.j2").render(shown, plots=plots(report, explanation))
    write_text(folder / "report.html", page)


def write_comparison_pages(record: Comparison, folder: Path) -> None:
    """Write `compare.md` and `compare.html` of `record` into `folder`."""
    labels = {"instructions": f"million instructions on {record.core}", "bytes": "file, MB"}
    drawn = {kind: front_plot(record.models, cost, labels[kind]) for kind, cost in costs(record).items()}
    shown = {
        "record": record,
        "counted": not record.instructions_absent,
        "fronts": fronts(record),
        "plots": drawn,
    }
    environment = pages()
    for name in ("compare.md", "compare.html"):
        write_text(folder / name, environment.get_template(f"{name}.j2").render(shown))


def _counted(names: list[str]) -> str:
    return ", ".join(f"{name} {count}x" for name, count in Counter(names).most_common())
