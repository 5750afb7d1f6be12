"""`report.md` and `report.html` from the record."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from hadaptive_q.atomic import write_text
from hadaptive_q.report.plots import plots
from hadaptive_q.report.record import Report


def write_report_pages(report: Report, folder: Path) -> None:
    """Write both pages of `report` into `folder`."""
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
    shown = {"report": report, "weakest": sorted(report.layers, key=lambda layer: layer.sqnr_db)[:10]}
    write_text(folder / "report.md", environment.get_template("report.md.j2").render(shown))
    page = environment.get_template("report.html.j2").render(shown, plots=plots(report))
    write_text(folder / "report.html", page)


def _counted(names: list[str]) -> str:
    return ", ".join(f"{name} {count}x" for name, count in Counter(names).most_common())
