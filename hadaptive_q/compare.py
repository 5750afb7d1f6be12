"""Models side by side: each becomes a run, or is taken from one, and then all files are measured together."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hadaptive_q.arm import build
from hadaptive_q.arm.count import count_instructions
from hadaptive_q.atomic import output_folder, write_text
from hadaptive_q.bench import bench_files
from hadaptive_q.candidates import Candidate, Candidates
from hadaptive_q.changes import float_drop
from hadaptive_q.data.datasets import digest, labels_of
from hadaptive_q.data.sources import open_data
from hadaptive_q.errors import UserError, first_line
from hadaptive_q.finished import PTE_FILES, find_finished, read_finished
from hadaptive_q.models.checkpoint import load_model
from hadaptive_q.models.network import count_macs, count_parameters
from hadaptive_q.pipeline import quantize
from hadaptive_q.report.answers import split_digest
from hadaptive_q.report.comparison import ComparedModel, Comparison, DropRecord, FailedModel, InstructionRecord
from hadaptive_q.report.record import Latency, Report, versions
from hadaptive_q.report.render import write_comparison_pages

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Run:
    """A finished run of the comparison, and the instructions of its files."""

    name: str
    folder: Path
    report: Report
    instructions: InstructionRecord | None

    @property
    def files(self) -> list[Path]:
        return [self.folder / name for name in PTE_FILES]


def compare(candidates: Candidates, out: Path, core: str) -> Comparison:
    """Run the recipe of every candidate into `out`/NAME, measure all and write `compare.json`, `.md` and `.html`.

    What is finished in `out` is not repeated, what was interrupted goes on. Instructions are those of `core`, where
    this machine can emulate it. A candidate that fails is left out and named with its reason.
    Raises UserError where all fail, and for a finished run that is broken or answered other images than the data has.
    """
    with output_folder(out):
        return _compare(candidates, out, core)


def _compare(candidates: Candidates, out: Path, core: str) -> Comparison:
    data = open_data(candidates.data)
    labels = labels_of(data.val).tolist()
    split = split_digest(digest(data.val, range(len(labels))), labels)
    for candidate in candidates.models:
        if candidate.taken:  # before hours of training
            _check_split(candidate.taken, split, candidates.data)
    absent = _uncountable()
    runs: list[_Run] = []
    failed: list[FailedModel] = []
    for candidate in candidates.models:
        try:
            runs.append(_run(candidate, out, split, None if absent else core))
        except (UserError, RuntimeError, FloatingPointError) as error:
            failed.append(FailedModel(name=candidate.name, error=first_line(error)))
            log.warning("%s failed: %s", candidate.name, failed[-1].error)
    if not runs:
        raise UserError(
            "comparison", f"nothing but failures, such as {failed[0].name}: '{failed[0].error}'", "a model that works"
        )
    log.info("timing %d files in alternation", len(runs) * len(PTE_FILES))
    record = Comparison(
        data=candidates.data,
        split=split,
        core=core,
        instructions_absent=absent,
        versions=versions(),
        models=list(_measured(runs, out)),
        failed=failed,
    )
    write_comparison_pages(record, out)
    write_text(out / "compare.json", record.model_dump_json(indent=1) + "\n")
    return record


def _check_split(folder: Path, split: str, data: str) -> None:
    report = read_finished(folder)
    if report.answers is None or report.answers.split != split:
        got = f"{report.accuracy.samples} validation images of {report.data}"
        raise UserError(f"run {folder}", got, f"those of --data {data}", "name its own data, or leave it out")


def _uncountable() -> str:
    """Say in one line why nothing can be counted on this machine, or return an empty string."""
    try:
        build.prepare()
    except UserError as error:
        return str(error)
    return ""


def _run(candidate: Candidate, out: Path, split: str, core: str | None) -> _Run:
    folder = candidate.taken or out / candidate.name
    report = _report(candidate, folder, split)
    counts = None
    if core:
        pte, float_pte = (count_instructions(folder / name, core).total for name in PTE_FILES)
        counts = InstructionRecord(pte=pte, float_pte=float_pte)
    return _Run(candidate.name, folder, report, counts)


def _report(candidate: Candidate, folder: Path, split: str) -> Report:
    if candidate.recipe is None:
        return read_finished(folder)
    report = find_finished(candidate.recipe, folder, candidate.checkpoint)
    if report and report.answers and report.answers.split == split:
        log.info("%s: finished before", folder)
        return report
    log.info("%s: recipe %s", candidate.name, candidate.recipe.name)
    return quantize(candidate.recipe, folder, candidate.checkpoint)


def _measured(runs: Sequence[_Run], out: Path) -> Iterable[ComparedModel]:
    costs = iter(bench_files([file for run in runs for file in run.files], []))
    first: float | None = None
    for run in runs:
        report, file, float_file = run.report, next(costs), next(costs)
        latency = Latency(
            host_ms_median=file["host_ms_median"],
            host_ms_spread=file["host_ms_spread"],
            float_host_ms_median=float_file["host_ms_median"],
            float_host_ms_spread=float_file["host_ms_spread"],
        )
        first = first or latency.host_ms_median
        network = load_model(run.folder / "float.safetensors")
        assert network.preprocess is not None
        drop = float_drop(report)
        low, high = drop.interval
        yield ComparedModel(
            name=run.name,
            run=os.path.relpath(run.folder, out),
            model=report.model,
            recipe=report.recipe,
            recipe_digest=report.recipe_digest,
            seed=report.seed,
            image_size=network.preprocess.image_size,
            params=count_parameters(network),
            macs=count_macs(network, network.preprocess.image_size),
            accuracy=report.accuracy,
            drop=DropRecord(points=drop.points, low=low, high=high),
            float_agreement=report.parity.float_agreement,
            float_sqnr_db=report.parity.float_sqnr_db,
            pte_bytes=file["bytes"],
            float_pte_bytes=float_file["bytes"],
            instructions=run.instructions,
            latency=latency,
            latency_ratio=latency.host_ms_median / first,
            float_latency_ratio=latency.float_host_ms_median / first,
            delegates=report.coverage.delegates,
            portable_ops=report.coverage.portable_ops,
        )
