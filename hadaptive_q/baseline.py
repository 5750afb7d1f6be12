"""The committed baseline that a gate compares with: what a run was made of, its figures by layer, its right answers.

JSON, one figure a line, so that a diff of it shows what an update accepts. Free of torch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from hadaptive_q.atomic import output_folder, write_text
from hadaptive_q.errors import UserError
from hadaptive_q.report.record import InputRecord, Part, Report

# What honest repetitions of a run differ in. The data is known by its split, wherever it lies.
_FREE = ("name", "seed", "data", "calibration.manifest")
# Of the packages, those that make a file or run it.
_DECIDING = ("hadaptive-q", "torch", "torchao", "executorch")
# Equal tensors have infinite SQNR; beyond this nothing changes what a file answers.
MOST_DB = 100.0


class Baseline(Part):
    """`settings` is the recipe that was run, by dotted key; `right` the file's right answers (`report.answers`).

    `sqnr_db` and `gain` are of every tensor alone, activations and weights (`LayerRecord`, `WeightRecord`); `flips` the
    share of channels that float does not choose, by ACH; `layer_bytes` what a layer's constants take.
    """

    format: Literal[1] = 1
    model: str
    recipe: str
    data: str
    split: str
    input: InputRecord | None
    settings: dict[str, str | bool | int | float | None]
    versions: dict[str, str]
    samples: int
    float_top1: float
    pte_top1: float
    right: str
    pte_bytes: int
    delegates: int
    portable_ops: dict[str, int]
    fp32_ops: dict[str, int]
    layer_bytes: dict[str, int]
    flips: dict[str, float]
    sqnr_db: dict[str, float]
    gain: dict[str, float]

    @property
    def fallbacks(self) -> dict[str, int]:
        """The operators that run in fp32 or outside of the delegate, how many of each."""
        outside = {f"{name} outside the delegate": count for name, count in self.portable_ops.items()}
        return outside | {f"{name} in fp32": count for name, count in self.fp32_ops.items()}

    def kind(self) -> dict[str, Any]:
        """Return what two runs must have in common to be compared, by dotted key, the plainest difference first."""
        parts = {name: getattr(self, name) for name in ("versions", "model", "data", "split", "input", "settings")}
        return dict(_flat(parts | {"input": self.input and self.input.model_dump()}))

    def write(self, path: Path) -> None:
        """Write the baseline to `path` in one step; its folder is made where it is missing."""
        with output_folder(path.parent):
            write_text(path, self.model_dump_json(indent=1) + "\n")


def make_baseline(report: Report, where: str) -> Baseline:
    """Return what a baseline keeps of `report`. Raises UserError for a report that lacks what it compares."""
    alone = {
        layer.name: (layer.local_sqnr_db, layer.gain)
        for layer in report.layers
        if layer.local_sqnr_db is not None and layer.gain is not None
    } | {f"{weight.name}.weight": (weight.sqnr_db, weight.gain) for weight in report.weights}
    if report.answers is None or len(alone) < len(report.layers) + len(report.weights):
        raise UserError(where, "a report without right answers", "a report of this version", "run it again")
    coverage = report.coverage
    return Baseline(
        model=report.model,
        recipe=report.recipe,
        data=report.data,
        split=report.answers.split,
        input=report.input,
        settings={key: value for key, value in _flat(report.settings) if key not in _FREE},
        versions={name: report.versions[name] for name in _DECIDING if name in report.versions},
        samples=report.accuracy.samples,
        float_top1=round(report.accuracy.float_top1, 4),
        pte_top1=round(report.accuracy.pte_top1, 4),
        right=report.answers.pte_right,
        pte_bytes=report.size.pte_bytes,
        delegates=coverage.delegates,
        portable_ops=dict(sorted(Counter(coverage.portable_ops).items())),
        fp32_ops=dict(sorted(Counter(coverage.fp32_ops).items())),
        layer_bytes={layer.layer: layer.weights + layer.biases + layer.scales for layer in coverage.layers},
        flips={ach.name: round(ach.flip_rate, 4) for ach in report.ach},
        sqnr_db={name: round(min(sqnr_db, MOST_DB), 2) for name, (sqnr_db, _) in alone.items()},
        gain={name: round(gain, 5) for name, (_, gain) in alone.items()},
    )


def read_baseline(path: Path, now: Baseline) -> Baseline:
    """Return the baseline at `path`, which must be of the same kind of run as `now`.

    Raises UserError where it is missing or no baseline, and where it was made by other versions or of another model,
    recipe, input or validation split: what differs is named, and nothing is compared.
    """
    where, remedy = f"baseline {path}", "--update-baseline writes it anew"
    try:
        found = Baseline.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise UserError(where, reason, "the baseline of an earlier run", "--update-baseline writes it") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the whole of it"
        raise UserError(f"{where}, {key}", f"'{first['msg']}'", "a baseline of this version", remedy) from error
    before, after = found.kind(), now.kind()
    for key in before | after:
        if before.get(key) != after.get(key):
            raise UserError(f"{where}, {key}", _text(before, key), f"{_text(after, key)}, as the run has", remedy)
    return found


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _text(kind: Mapping[str, Any], key: str) -> str:
    return json.dumps(kind[key]) if key in kind else "nothing"
