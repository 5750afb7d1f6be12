"""A run against its baseline: every figure that a budget can hold, and who is guilty of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hadaptive_q.baseline import Baseline
from hadaptive_q.report.answers import unpack
from hadaptive_q.report.record import Report
from hadaptive_q.significance import Drop

SHOWN = 5
# What honest repetitions of a run stay well below (docs/gate.md): a layer's fall of SQNR in dB, its change of gain, the
# rise of an ACH's share of channels that float does not choose.
SQNR_FALL, GAIN_CHANGE, FLIP_RISE = 6.0, 0.005, 0.1


@dataclass(frozen=True)
class LayerChange:
    """How much worse one tensor is than in the baseline, measured alone: SQNR in dB, gain as a share."""

    name: str
    sqnr_db: tuple[float, float]
    gain: tuple[float, float]

    @property
    def fall(self) -> float:
        return self.sqnr_db[0] - self.sqnr_db[1]

    @property
    def gain_change(self) -> float:
        return abs(self.gain[1] - self.gain[0])

    @property
    def weight(self) -> float:
        """How far it is beyond what honest repetitions do: 1 is as far as the default budgets go."""
        return max(self.fall / SQNR_FALL, self.gain_change / GAIN_CHANGE)


def layer_changes(now: Baseline, before: Baseline) -> list[LayerChange]:
    """Return the tensors that both have, the worst change first."""
    found = [
        LayerChange(name, (before.sqnr_db[name], now.sqnr_db[name]), (before.gain[name], now.gain[name]))
        for name in now.sqnr_db
        if name in before.sqnr_db
    ]
    return sorted(found, key=lambda change: -change.weight)


def float_drop(report: Report) -> Drop:
    """Return what the file of a run loses against float, image by image."""
    assert report.answers is not None
    return Drop(report.answers.lost, report.answers.won, report.accuracy.samples)


def paired_drop(now: Baseline, before: Baseline) -> Drop:
    """Return what the file now loses against the baseline's, image by image."""
    was, is_ = (unpack(each.right, each.samples) for each in (before, now))
    return Drop(int(np.sum(was & ~is_)), int(np.sum(~was & is_)), now.samples)


def change_figures(now: Baseline, before: Baseline) -> dict[str, float]:
    """Return what budgets compare with a baseline.

    `baseline.drop` in points; `baseline.size_ratio` of the files' bytes; `baseline.fallbacks`: operators more outside
    the delegate, or inside it in fp32; `baseline.recoded`: tensors that only one of both has in codes; the largest fall
    of a tensor's SQNR alone in dB, change of its gain, and rise of an ACH's flip rate.
    """
    layers = layer_changes(now, before)
    return {
        "baseline.drop": paired_drop(now, before).points,
        "baseline.size_ratio": now.pte_bytes / before.pte_bytes,
        "baseline.fallbacks": sum(_more(now.fallbacks, before.fallbacks).values()),
        "baseline.recoded": len(now.sqnr_db.keys() ^ before.sqnr_db.keys()),
        "baseline.sqnr_fall": max((change.fall for change in layers), default=0.0),
        "baseline.gain_change": max((change.gain_change for change in layers), default=0.0),
        "baseline.flip_rise": max(
            (rate - before.flips.get(name, 0.0) for name, rate in now.flips.items()), default=0.0
        ),
    }


def guilty(now: Baseline, before: Baseline, report: Report) -> list[str]:
    """Return a line for each of the layers, operators and bytes that changed most, at most five of a kind.

    `report` is that of the run `now`, and says which module a tensor belongs to.
    """
    origins = {layer.name: layer.origin for layer in report.layers}
    origins |= {f"{weight.name}.weight": weight.layer for weight in report.weights}
    worst = [change for change in layer_changes(now, before)[:SHOWN] if change.weight > 1 / 2]
    lines = [
        f"{origins[change.name]} ({change.name}): SQNR {change.sqnr_db[0]:.1f} -> {change.sqnr_db[1]:.1f} dB,"
        f" gain {change.gain[0]:.4f} -> {change.gain[1]:.4f}"
        for change in worst
    ]
    new, gone = now.sqnr_db.keys() - before.sqnr_db.keys(), before.sqnr_db.keys() - now.sqnr_db.keys()
    lines += [f"{origins[name]} ({name}): newly in codes" for name in sorted(new)[:SHOWN]]
    lines += [f"{name}: no longer in codes" for name in sorted(gone)[:SHOWN]]
    lines += [f"{name}: {count:+d}" for name, count in _largest(_more(now.fallbacks, before.fallbacks))]
    grown = _more(now.layer_bytes, before.layer_bytes)
    if now.pte_bytes > before.pte_bytes:
        lines += [f"{name or 'no layer'}: {count:+,d} bytes of constants" for name, count in _largest(grown)]
    lines += [
        f"{name}: {100 * before.flips.get(name, 0.0):.1f} -> {100 * rate:.1f} % of channels are not float's"
        for name, rate in now.flips.items()
        if rate > before.flips.get(name, 0.0) + FLIP_RISE / 2
    ][:SHOWN]
    identical = report.parity.integer_identical
    if identical is not None and identical < 1:
        lines.append(f"lowering: the file gives its program's very logits on {100 * identical:.1f} % of the images")
    return lines


def _more(now: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
    return {name: more for name, count in now.items() if (more := count - before.get(name, 0)) > 0}


def _largest(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: -item[1])[:SHOWN]
