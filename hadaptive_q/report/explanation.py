"""`explain.json`: what every rounding of a run does to its logits. Keys are a public contract, as the report's are."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from hadaptive_q.atomic import write_text
from hadaptive_q.report.record import AchRecord, Part


class Logits(Part):
    """SQNR of logits in dB: the program against the float network, and its two parts.

    `parameters_db`: the parameters that ship, before any rounding (after training, biases on the runtime's grid),
    against the float network; `rounding_db`: the program against those parameters; `held_db`: the same while every
    image keeps the channels it selects without rounding.
    """

    program_to_float_db: float
    parameters_db: float
    rounding_db: float
    held_db: float


class Blame(Part):
    """What one rounding does to the logits, against the same weights without any rounding.

    `alone_db`: SQNR where nothing else is rounded; `gained_db`: what SQNR gains where everything else is;
    `share`: the noise it makes alone over the noise of all; `held_share`: the same while every image keeps the
    channels it selects without rounding. Shares need not add up to 1: errors interact, and one swapped channel is
    as bad as many.
    """

    alone_db: float
    gained_db: float
    share: float
    held_share: float


class RoundedTensor(Part):
    """One scale, or one weight's scales, and the tensors stored with it.

    `name` and `sqnr_db` are those of the report's layers, an activation against the float network; a weight against
    itself before rounding. `low` and `high`: the range in float; `clipped`: the share of values beyond the codes
    in the quantized network. A weight has a scale per output channel: `scale` is the largest.
    """

    layer: str
    name: str
    kind: Literal["activation", "weight"]
    tensors: list[str]
    format: str
    granularity: Literal["per tensor", "per channel"]
    low: float
    high: float
    scale: float
    smallest_scale: float
    zero_point: int
    clipped: float
    sqnr_db: float
    blame: Blame


class FloatIsland(Part):
    """A layer, or the part of it, that computes in float between dequantize and quantize: operators and counts."""

    layer: str
    operators: dict[str, int]


class AchExplanation(AchRecord):
    """`scale_ratio`: ``s_a s_b / s_o``, one step of a product of codes in steps of the output.

    `rank_gap`: median difference of the scores of neighbouring ranks, down to the first that is not chosen;
    `score_error`: median change of a score; both over the spread (standard deviation over channels) of a sample's
    scores, and None where the selection is frozen. `tau`, `slope` (DySoft's a) and `bias_max` (the norm's ``|b|``)
    are the float network's.
    """

    operand_scale: float
    output_scale: float
    scale_ratio: float
    rank_gap: float | None
    score_error: float | None
    tau: float
    slope: float | None
    bias_max: float


class Explanation(Part):
    """Everything `explain` says of a run; `tensors` come most blamed first."""

    model: str
    recipe: str
    recipe_digest: str
    data: str
    samples: int
    logits: Logits
    tensors: list[RoundedTensor]
    ach: list[AchExplanation]
    float_islands: list[FloatIsland]

    @property
    def selects(self) -> bool:
        """Whether any ACH chooses channels per image."""
        return self.logits.held_db != self.logits.rounding_db

    @property
    def swapped_share(self) -> float:
        """The share of the rounding noise that is gone once every image keeps its channels."""
        return max(0.0, 1 - 10 ** ((self.logits.rounding_db - self.logits.held_db) / 10))

    def write(self, path: Path) -> None:
        """Write the record to `path` in one step."""
        write_text(path, self.model_dump_json(indent=1) + "\n")
