"""Write the program of a finished run in other formats, without running anything of it again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hadaptive_q import atomic
from hadaptive_q.data.datasets import labels_of
from hadaptive_q.lower.file_formats import find_formats
from hadaptive_q.passports import Origin
from hadaptive_q.pipeline import write_checked
from hadaptive_q.restore import open_run


def export_run(run: Path, to: Sequence[str], out: Path) -> list[Path]:
    """Write the program of the finished run in the folder `run` to ``out/model.FORMAT`` and return these paths.

    `float.json`, which says how images are prepared, goes with them, and a passport with each. Raises UserError for an
    unknown format, one whose packages are not installed, a folder that is no finished run, or one that cannot be
    written.
    """
    formats = find_formats(to)
    finished = open_run(run)
    program = finished.program()
    atomic.output_folder(out)
    atomic.write_bytes(out / "float.json", (run / "float.json").read_bytes())
    written = {out / f"model.{name}": format_ for name, format_ in formats.items()}
    data, report = finished.data, finished.report
    origin = Origin(finished.recipe, report.model, data.preprocess, labels_of(data.val), report.calibration_digest)
    for path, format_ in written.items():
        write_checked(path, format_.lower(program), format_.open, data)
        origin.of_file(path, format_.open(path).predict(data.val, data.preprocess), program)
    return list(written)
