"""`compare.json`: models side by side on one validation split. Keys are a public contract, as the report's are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hadaptive_q.report.record import Accuracy, Latency, Part


class DropRecord(Part):
    """What the file loses against float in points of top-1, and the 95 % confidence interval of that."""

    points: float
    low: float
    high: float


class InstructionRecord(Part):
    """Instructions of one inference on the emulated core."""

    pte: int
    float_pte: int


class ComparedModel(Part):
    """One model: `run` is the folder of its run as seen from the comparison's, `image_size` the side of its input.

    Accuracies, the agreement with float and the logits' SQNR to it are the run's own; all costs are measured in the
    comparison. `latency_ratio` and `float_latency_ratio` are to the quantized file of the first model.
    """

    name: str
    run: str
    model: str
    recipe: str
    recipe_digest: str
    seed: int
    image_size: int
    params: int
    macs: int
    accuracy: Accuracy
    drop: DropRecord
    float_agreement: float
    float_sqnr_db: float
    pte_bytes: int
    float_pte_bytes: int
    instructions: InstructionRecord | None
    latency: Latency
    latency_ratio: float
    float_latency_ratio: float
    delegates: int
    portable_ops: list[str]


class FailedModel(Part):
    """A model that did not come through, and why in one line."""

    name: str
    error: str


class Comparison(Part):
    """The whole comparison; `split` is the digest of the images that every model answered.

    All files ran in alternation. Where nothing could be counted on `core`, `instructions_absent` says why.
    """

    data: str
    split: str
    core: str
    instructions_absent: str
    versions: dict[str, str]
    models: list[ComparedModel]
    failed: list[FailedModel]


Cost = Callable[[ComparedModel], int]


def costs(record: Comparison) -> dict[str, Cost]:
    """Return by name what the quantized files cost: their bytes, and their instructions where they were counted."""
    found: dict[str, Cost] = {"bytes": lambda model: model.pte_bytes}
    if not record.instructions_absent:
        found = {"instructions": _instructions, **found}
    return found


def _instructions(model: ComparedModel) -> int:
    assert model.instructions is not None
    return model.instructions.pte


def fronts(record: Comparison) -> dict[str, list[ComparedModel]]:
    """Return the Pareto front of accuracy and each of the costs."""
    return {name: front(record.models, cost) for name, cost in costs(record).items()}


def front(models: Sequence[ComparedModel], cost: Cost) -> list[ComparedModel]:
    """Return the models that none beats in top-1 of the file and in `cost`, the cheapest first.

    To beat is to be no worse in either and better in one.
    """

    def beats(a: ComparedModel, b: ComparedModel) -> bool:
        ours, theirs = ((-cost(m), m.accuracy.pte_top1) for m in (a, b))
        return ours != theirs and all(x >= y for x, y in zip(ours, theirs, strict=True))

    return sorted((m for m in models if not any(beats(other, m) for other in models)), key=cost)
