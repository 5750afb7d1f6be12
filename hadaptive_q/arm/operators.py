"""Say which operator takes how many instructions: where an inference spends its time on an emulated core."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hadaptive_q.arm.count import INFERENCES, TIMEOUT, Counts
from hadaptive_q.arm.guest import CLOCK, ENTER, INPUTS, LEAVE, MODEL, Cut, open_guest

PREPARE = "(prepare)"
_DELEGATE = "DELEGATE_CALL"
_KERNEL = "native_call_"


@dataclass(frozen=True)
class Operator:
    """One executed operator: XNNPACK's or the runtime's name, the delegate's index in order of calls or None, its cost.

    The operator "(prepare)" is what a delegate does before its first one: shapes, memory, inputs, and here also some
    750 instructions of tracing.
    """

    name: str
    delegate: int | None
    counts: Counts


def count_operators(
    pte: Path, core: str, inputs: bytes | None = None, timeout: float = TIMEOUT
) -> tuple[Operator, ...]:
    """Count every operator of one inference of `pte` on `core`, in order of execution.

    Arguments and errors are those of `count_instructions`, whose total the sum meets but for tracing and for what the
    runtime does between operators. A delegate's operators are exact, others to the 30 instructions of their marks.
    """
    with open_guest(pte, core, timeout) as guest:
        arguments = ["operators", MODEL, INFERENCES]
        if inputs is not None:
            (guest.folder / INPUTS).write_bytes(inputs)
            arguments.append(INPUTS)
        printed, cuts = guest.count(arguments, traced=True)
    events = [line for line in printed if not line.startswith("input ")]
    return tuple(_read(events, cuts[1:-1]))


def _read(events: Sequence[str], cuts: Sequence[Cut]) -> Iterator[Operator]:
    """Pair events and cuts: every enter and leave has a cut of its own, and a delegate's clock readings lie between."""
    at, delegates = 0, 0
    for index, event in enumerate(events):
        kind, _, name = event.partition(" ")
        if kind == "delegated":
            continue
        if cuts[at].mark != (ENTER if kind == "enter" else LEAVE):
            raise RuntimeError(f"mark {at} is {cuts[at].mark} at event {event!r}")
        start, at = at, at + 1
        while at < len(cuts) and cuts[at].mark == CLOCK:
            at += 1
        if kind != "enter":
            continue
        steps = _delegated(events[index + 1 :])
        if steps:
            yield from _operators(steps, cuts[start], cuts[start + 1 : at], delegates)
        elif events[index + 1] == "leave":  # nothing inside: a kernel, or a delegate that reports no operators
            delegate = delegates if name == _DELEGATE else None
            yield Operator(name.removeprefix(_KERNEL), delegate, _between(cuts[start], cuts[at]))
        delegates += name == _DELEGATE


def _delegated(events: Sequence[str]) -> list[tuple[int, str]]:
    """Return (steps, name) of the events up to the next one of another kind; names lose their running number."""
    found = []
    for event in events:
        kind, steps, name = [*event.split(" ", 2), "", ""][:3]
        if kind != "delegated":
            break
        found.append((int(steps), re.sub(r" #\d+$", "", name)))
    return found


def _operators(
    steps: Sequence[tuple[int, str]], enter: Cut, clocks: Sequence[Cut], delegate: int
) -> Iterator[Operator]:
    """Cut one delegate call at its clock readings: the last one ends the last operator, and steps count backwards."""
    at = len(clocks) - 1 - sum(count for count, _ in steps)
    if at < 0:
        raise RuntimeError(f"delegate {delegate} read the clock {len(clocks)} times for {len(steps)} operators")
    yield Operator(PREPARE, delegate, _between(enter, clocks[at]))
    for count, name in steps:
        yield Operator(name, delegate, _between(clocks[at], clocks[at + count]))
        at += count


def _between(earlier: Cut, later: Cut) -> Counts:
    by_class = later.since(earlier)
    return Counts(sum(by_class.values()), by_class)
