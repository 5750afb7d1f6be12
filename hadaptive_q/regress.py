"""Hold a run's report against budgets: the gate. Free of torch, so that it answers at once."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hadaptive_q.errors import UserError, nearest
from hadaptive_q.report.record import Report

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "==": operator.eq,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_BUDGET = re.compile(r"\s*([\w.]+)\s*(==|<=|>=|<|>)\s*(-?[0-9.]+(?:[eE]-?[0-9]+)?)\s*")


@dataclass(frozen=True)
class Violation:
    """A budget that a report does not keep: `figure` is what the report says."""

    budget: str
    figure: float

    def __str__(self) -> str:
        return f"{self.budget}: it is {self.figure:g}"


def check_budgets(report: Report, budgets: Sequence[str]) -> list[Violation]:
    """Return the budgets that `report` does not keep.

    A budget is ``KEY OPERATOR NUMBER``, such as ``coverage.fp32_ops == 0`` or ``accuracy.drop <= 0.5``: a key of
    report.json (a list counts its members), or one of those `derived` adds, and ``== <= >= < >``. Raises UserError for
    a budget that says something else.
    """
    known = figures(report)
    violations = []
    for budget in budgets:
        parsed = _BUDGET.fullmatch(budget)
        if parsed is None:
            raise UserError(f"--budget '{budget}'", "no budget", "KEY OPERATOR NUMBER, as in 'coverage.delegates == 1'")
        key, comparison, limit = parsed.groups()
        if key not in known:
            raise UserError(f"--budget '{budget}'", f"no figure {key}", "a figure of the report", nearest(key, known))
        if not _COMPARISONS[comparison](known[key], _number(limit, budget)):
            violations.append(Violation(budget.strip(), known[key]))
    return violations


def figures(report: Report) -> dict[str, float]:
    """Return every figure of `report` by its dotted key: numbers as they are, lists as how many they hold."""
    return {**_flat(report.model_dump(mode="python"), ""), **derived(report)}


def derived(report: Report) -> dict[str, float]:
    """Return what budgets are about and the report leaves to its readers.

    `accuracy.drop` in points from float to file, `size.ratio` of file to float, `latency.ratio` of file to float.
    """
    accuracy, size, latency = report.accuracy, report.size, report.latency
    return {
        "accuracy.drop": accuracy.float_top1 - accuracy.pte_top1,
        "size.ratio": size.pte_bytes / size.float_pte_bytes,
        "latency.ratio": latency.host_ms_median / latency.float_host_ms_median,
    }


def _flat(content: Mapping[str, object], prefix: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            found[prefix + key] = len(value)
        elif isinstance(value, int | float):
            found[prefix + key] = value
    return found


def _number(text: str, budget: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"--budget '{budget}'", f"'{text}'", "a number") from error
