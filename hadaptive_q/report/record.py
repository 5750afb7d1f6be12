"""`report.json`: the record of one run. Keys are a public contract: added to, never renamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from hadaptive_q.atomic import write_text
from hadaptive_q.errors import UserError


class Part(BaseModel):
    """A section of a record: unknown keys are refused."""

    # Infinite ratios (equal tensors) become JSON texts: a bare Infinity is no JSON.
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class Accuracy(Part):
    """Top-1 in percent over the whole validation split, each by running that very form."""

    samples: int
    float_top1: float
    quantized_top1: float
    pte_top1: float
    onnx_top1: float | None = None
    float_top5: float
    pte_top5: float


class Answers(Part):
    """Right answers over the validation split, in its order, as `report.answers` packs them.

    `split` is a digest of the images' identities and labels; `lost` are those that float has right and the file
    wrong, `won` the other way round.
    """

    split: str
    float_right: str
    pte_right: str
    lost: int
    won: int


class Size(Part):
    """Bytes of the written files; deflated is what a download costs."""

    float_pte_bytes: int
    pte_bytes: int
    pte_deflated_bytes: int
    onnx_bytes: int | None = None


class ParityRecord(Part):
    """The written file against the quantized program, and both against float; codes are steps of the output.

    `integer_identical` is the share of images on which the file and the integer interpreter of the program give the
    very same logits. `float_*` is against the network as trained; where the selection is frozen, `frozen_*` is against
    the float network with those channels. `onnx_*` is `model.onnx` against the quantized program, where it was written.
    """

    top1_agreement: float
    changed_fraction: float
    max_codes: int
    sqnr_db: float
    integer_identical: float | None = None
    float_agreement: float
    float_sqnr_db: float
    frozen_agreement: float | None = None
    frozen_sqnr_db: float | None = None
    onnx_top1_agreement: float | None = None
    onnx_changed_fraction: float | None = None
    onnx_max_codes: int | None = None
    onnx_sqnr_db: float | None = None


class LayerBytesRecord(Part):
    """Bytes of a layer's constants in the written file."""

    layer: str
    weights: int
    biases: int
    scales: int


class CoverageRecord(Part):
    """What the written file is made of: delegates, operators inside them by precision and outside, what moves data.

    `layers` are those with constants, the largest first; `wanted_arm_features` what an ARM64 CPU should have for it,
    as `/proc/cpuinfo` names it.
    """

    delegates: int
    portable_ops: list[str]
    int8_ops: list[str] = []
    fp32_ops: list[str]
    conversions: int | None = None
    copies: int | None = None
    transposes: int | None = None
    layers: list[LayerBytesRecord] = []
    wanted_arm_features: list[str] = []


class InputRecord(Part):
    """What the written file takes: `dtype` float32 or uint8, `shape` of one image in the file's layout."""

    dtype: str
    shape: list[int]


class AchRecord(Part):
    """One ACH over a part of the validation split: `flip_rate` is the share of chosen channels that float did not
    choose, `rank_flip_rate` the share of slots that hold another channel."""

    name: str
    selection: Literal["dynamic", "static"]
    flip_rate: float
    rank_flip_rate: float
    train_eval_overlap: float | None
    operand_sqnr_db: float
    product_sqnr_db: float
    output_sqnr_db: float
    mixed_max: float
    product_max: float
    normed_max: float


class LayerRecord(Part):
    """One quantized tensor: its SQNR against float, its float range and its scale.

    `local_sqnr_db` and `gain` ask this tensor alone: against what float makes of the quantized inputs and weights.
    `gain` is the least-squares slope on it as far as the codes reach, an intercept per channel: 1 but for rounding.
    """

    name: str
    origin: str
    sqnr_db: float
    local_sqnr_db: float | None = None
    gain: float | None = None
    low: float
    high: float
    scale: float


class WeightRecord(Part):
    """The weights of one layer: SQNR of what their codes stand for to the float network's, and the slope on those."""

    layer: str
    name: str
    sqnr_db: float
    gain: float


class Latency(Part):
    """Milliseconds per image on this machine, both files in alternation."""

    host_ms_median: float
    host_ms_spread: float
    float_host_ms_median: float
    float_host_ms_spread: float


class Report(Part):
    """Everything measured about one run; `settings` is its resolved recipe."""

    model: str
    recipe: str
    recipe_digest: str
    calibration_digest: str
    data: str
    seed: int
    settings: dict[str, Any] = {}
    versions: dict[str, str]
    accuracy: Accuracy
    answers: Answers | None = None
    size: Size
    parity: ParityRecord
    coverage: CoverageRecord
    input: InputRecord | None = None
    ach: list[AchRecord]
    layers: list[LayerRecord]
    weights: list[WeightRecord] = []
    latency: Latency
    arm: dict[str, dict[str, int]] = {}

    def write(self, path: Path) -> None:
        """Write the record to `path` in one step."""
        write_text(path, self.model_dump_json(indent=1) + "\n")


def read_report(path: Path) -> Report:
    """Return the report at `path`, a report.json or the folder of a run. Raises UserError for anything else."""
    file = path / "report.json" if path.is_dir() else path
    try:
        return Report.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise UserError(f"report {file}", reason, "a report.json or the folder of a finished run") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole of it"
        raise UserError(f"{file}, {where}", f"'{first['msg']}'", "a report of this version", "run it again") from error


def versions(*others: str) -> dict[str, str]:
    """Return the versions of everything that decides a result, and of the packages `others`."""
    import platform
    from importlib.metadata import version

    names = ("hadaptive-q", "torch", "torchao", "executorch", *others)
    return {"python": platform.python_version()} | {name: version(name) for name in names}
