"""Hold a run against budgets and a baseline: the gate. Free of torch, so that it answers at once."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hadaptive_q.arm.count import count_instructions
from hadaptive_q.baseline import leaves, make_baseline, read_baseline
from hadaptive_q.changes import FLIP_RISE, GAIN_CHANGE, SQNR_FALL, change_figures, float_drop, guilty, paired_drop
from hadaptive_q.errors import UserError, nearest
from hadaptive_q.report.record import Report, read_report
from hadaptive_q.significance import Drop, needed_samples

# The keywords of the pytest marker: the same budgets under names.
NAMES: dict[str, str] = {
    "max_drop": "accuracy.drop <=",
    "max_size_ratio": "size.ratio <=",
    "max_instruction_ratio": "instructions.ratio <=",
    "max_latency_ratio": "latency.ratio <=",
    "min_agreement": "parity.float_agreement >=",
    "min_identical": "parity.integer_identical >=",
    "max_flip": "ach.flip <=",
    "max_baseline_drop": "baseline.drop <=",
    "max_growth": "baseline.size_ratio <=",
    "max_fallbacks": "baseline.fallbacks <=",
    "max_recoded": "baseline.recoded <=",
    "max_sqnr_fall": "baseline.sqnr_fall <=",
    "max_gain_change": "baseline.gain_change <=",
    "max_flip_rise": "baseline.flip_rise <=",
}
# Held wherever there is a baseline, unless another budget has the same key (docs/gate.md says where they are from).
DEFAULTS = (
    "accuracy.drop <= 1",
    "parity.integer_identical >= 0.99",
    "baseline.drop <= 2",
    "baseline.size_ratio <= 1.02",
    "baseline.fallbacks <= 0",
    "baseline.recoded <= 0",
    f"baseline.sqnr_fall <= {SQNR_FALL}",
    f"baseline.gain_change <= {GAIN_CHANGE}",
    f"baseline.flip_rise <= {FLIP_RISE}",
)
CORE = "cortex-a76"
_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "==": operator.eq,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_BUDGET = re.compile(r"\s*([\w.]+)\s*(==|<=|>=|<|>)\s*(-?[0-9.]+(?:[eE]-?[0-9]+)?)\s*")
Verdict = Literal["kept", "undecided", "broken"]


@dataclass(frozen=True)
class Budget:
    """What a figure has to be: `text` as it was given."""

    text: str
    key: str
    comparison: str
    limit: float

    def keeps(self, figure: float) -> bool:
        return _COMPARISONS[self.comparison](figure, self.limit)


@dataclass(frozen=True)
class Held:
    """A budget held against a `figure`; `note` says how sure that is, where the figure comes from single images."""

    budget: str
    key: str
    figure: float
    verdict: Verdict
    note: str = ""

    def __str__(self) -> str:
        return f"{self.budget}: it is {self.figure:g}" + (f" ({self.note})" if self.note else "")


@dataclass(frozen=True)
class Outcome:
    """Every budget of a gate and who is guilty; `strict` counts an undecided budget as broken."""

    held: list[Held]
    guilty: list[str]
    strict: bool = False

    @property
    def broken(self) -> list[Held]:
        bad = ("broken", "undecided") if self.strict else ("broken",)
        return [held for held in self.held if held.verdict in bad]

    @property
    def undecided(self) -> list[Held]:
        return [held for held in self.held if held.verdict == "undecided"]

    def as_json(self) -> list[dict[str, Any]]:
        """Return the broken budgets for scripts; what is guilty stands with each."""
        return [
            {"budget": held.budget, "figure": held.figure, "note": held.note, "guilty": self.guilty}
            for held in self.broken
        ]

    def __str__(self) -> str:
        rows = [(held.verdict, held.budget, f"{held.figure:.6g}", held.note) for held in self.held]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        if self.broken and self.guilty:
            lines += ["changed most against the baseline:", *(f"  {line}" for line in self.guilty)]
        return "\n".join([*lines, f"{len(self.held) - len(self.broken)} of {len(self.held)} budgets kept"])


def hold(
    run: Path, budgets: Sequence[str], baseline: Path | None = None, update: bool = False, strict: bool = False
) -> Outcome:
    """Hold the run at `run`, its folder or report.json, against `budgets` and, where one is given, a `baseline`.

    With a baseline the default budgets hold, too, but for the keys that `budgets` has. `update` makes the run itself
    the baseline, and writes it unless a budget is broken.
    Raises UserError for a wrong budget or none at all, and for a baseline that is missing or of another kind of run.
    """
    if baseline is None and (update or not budgets):
        expected = "a baseline" if update else "a budget or a baseline"
        raise UserError(f"run {run}", "nothing to hold it against", expected, "add --baseline FILE")
    report = read_report(run)
    wanted = parse_budgets(budgets)
    known = figures(report)
    drops = {} if report.answers is None else {"accuracy.drop": float_drop(report)}
    blamed: list[str] = []
    if baseline is not None:
        now = make_baseline(report, f"run {run}")
        before = now if update else read_baseline(baseline, now)
        known |= change_figures(now, before)
        drops["baseline.drop"] = paired_drop(now, before)
        blamed = guilty(now, before, report)
        given = {budget.key for budget in wanted}
        wanted += [budget for budget in parse_budgets(DEFAULTS) if budget.key not in given]
    if any(budget.key == "instructions.ratio" for budget in wanted):
        known["instructions.ratio"] = _instruction_ratio(run)
    outcome = Outcome([_held(budget, known, drops.get(budget.key)) for budget in wanted], blamed, strict)
    if baseline is not None and update and not outcome.broken:
        make_baseline(report, f"run {run}").write(baseline)
    return outcome


def parse_budgets(budgets: Sequence[str]) -> list[Budget]:
    """Return the budgets that texts say.

    Each is ``KEY OPERATOR NUMBER``, such as ``coverage.fp32_ops == 0`` or ``accuracy.drop <= 0.5``: a key of
    report.json (a list counts its members), or one of those that `derived` and `changes.change_figures` add, and
    ``== <= >= < >``. Raises UserError for a budget that says something else.
    """
    found = []
    for budget in budgets:
        parsed = _BUDGET.fullmatch(budget)
        if parsed is None:
            raise UserError(f"--budget '{budget}'", "no budget", "KEY OPERATOR NUMBER, as in 'coverage.delegates == 1'")
        key, comparison, limit = parsed.groups()
        found.append(Budget(budget.strip(), key, comparison, _number(limit, budget)))
    return found


def named_budgets(limits: Mapping[str, Any], others: Sequence[str] = ()) -> list[str]:
    """Return the budgets of marker keywords such as ``max_drop=0.5``.

    Raises UserError for an unknown keyword, which may be meant for one of the `others`, too.
    """
    for name, limit in limits.items():
        if name not in NAMES:
            known = (*NAMES, *others)
            raise UserError(
                f"quant_gate({name}=...)", "an unknown keyword", f"one of {', '.join(known)}", nearest(name, known)
            )
        if isinstance(limit, bool) or not isinstance(limit, int | float):
            raise UserError(f"quant_gate({name}=...)", repr(limit), "a number")
    return [f"{NAMES[name]} {float(limit)!r}" for name, limit in limits.items()]


def figures(report: Report) -> dict[str, float]:
    """Return every figure of `report` by its dotted key: numbers as they are, lists as how many they hold."""
    found = dict(leaves(report.model_dump(mode="python", exclude={"settings"})))
    counted = {key: len(value) if isinstance(value, list) else value for key, value in found.items()}
    return {**{key: value for key, value in counted.items() if isinstance(value, int | float)}, **derived(report)}


def derived(report: Report) -> dict[str, float]:
    """Return what budgets are about and the report leaves to its readers.

    `accuracy.drop` in points from float to file, `size.ratio` of file to float, `latency.ratio` of file to float,
    `ach.flip` the largest share of channels that float does not choose.
    """
    accuracy, size, latency = report.accuracy, report.size, report.latency
    return {
        "accuracy.drop": accuracy.float_top1 - accuracy.pte_top1,
        "size.ratio": size.pte_bytes / size.float_pte_bytes,
        "latency.ratio": latency.host_ms_median / latency.float_host_ms_median,
        "ach.flip": max((ach.flip_rate for ach in report.ach), default=0.0),
    }


def _held(budget: Budget, known: Mapping[str, float], drop: Drop | None) -> Held:
    if budget.key not in known:
        if budget.key.startswith("baseline."):
            raise UserError(f"--budget '{budget.text}'", "no baseline", "one to compare with", "add --baseline FILE")
        hint = nearest(budget.key, known)
        raise UserError(f"--budget '{budget.text}'", f"no figure {budget.key}", "a figure of the report", hint)
    figure = known[budget.key]
    kept = budget.keeps(figure)
    if drop is None:
        return Held(budget.text, budget.key, figure, "kept" if kept else "broken")
    low, high = drop.interval
    note = f"95 %: {low:+.2f} to {high:+.2f}"
    # Where both ends answer as the figure does, the images decide.
    if {budget.keeps(low), budget.keeps(high)} == {kept}:
        return Held(budget.text, budget.key, figure, "kept" if kept else "broken", note)
    needed = needed_samples(drop, budget.limit)
    at_least = "more than there are" if needed is None else f"at least {needed}"
    note += f"; {drop.samples:.0f} images cannot tell {budget.limit:g} points, {at_least} needed"
    return Held(budget.text, budget.key, figure, "undecided" if kept else "broken", note)


def _instruction_ratio(run: Path) -> float:
    folder = run if run.is_dir() else run.parent
    ours, reference = (count_instructions(folder / name, CORE).total for name in ("model.pte", "float.pte"))
    return ours / reference


def _number(text: str, budget: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"--budget '{budget}'", f"'{text}'", "a number") from error
