"""The passport of a written file, beside it: what it is, what it was made of, and how it answers.

Free of torch. `FILE.passport.json` is taken away before FILE is written anew and written after it, so that a passport
never stands beside another file's bytes.
"""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

from pydantic import ValidationError

from hadaptive_q.atomic import write_text
from hadaptive_q.errors import UserError
from hadaptive_q.models.config import Preprocess
from hadaptive_q.report.record import InputRecord, Part

SUFFIX = ".passport.json"
ARTEFACTS = ("pte", "onnx", "safetensors")


class Golden(Part):
    """The answers to `lower.golden.golden_images`: `logits` by image and class, `step` of one output code if any."""

    logits: list[list[float]]
    step: float | None


class FileAccuracy(Part):
    """Top-1 and top-5 of this very file in percent, over the whole validation split."""

    top1: float
    top5: float
    samples: int


class Passport(Part):
    """Everything that should travel with a file. `digest` is that of all other fields: a slip, not a seal."""

    file: str
    bytes: int
    sha256: str
    model: str
    data: str
    seed: int
    recipe: str
    recipe_digest: str
    calibration_digest: str | None
    versions: dict[str, str]
    processor: str
    preprocess: Preprocess
    input: InputRecord | None
    wanted_arm_features: list[str]
    accuracy: FileAccuracy
    golden: Golden
    digest: str = ""

    def own_digest(self) -> str:
        """Return the digest of all fields but `digest`."""
        content = self.model_dump_json(exclude={"digest"})
        return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"

    def write(self, beside: Path) -> None:
        """Write the passport of the file `beside`, digest included."""
        signed = self.model_copy(update={"digest": self.own_digest()})
        write_text(passport_path(beside), signed.model_dump_json(indent=1) + "\n")


def passport_path(file: Path) -> Path:
    """Return where the passport of `file` is."""
    return file.with_name(file.name + SUFFIX)


def drop_passport(file: Path) -> None:
    """Take away the passport of `file`, which is about to be written anew."""
    passport_path(file).unlink(missing_ok=True)


def read_passport(file: Path) -> Passport:
    """Return the passport beside `file`. Raises UserError where there is none, or it is none of this version."""
    path = passport_path(file)
    try:
        return Passport.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise UserError(
            f"passport {path}", reason, "the passport that was written with the file", "copy it along, or run again"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole of it"
        raise UserError(f"{path}, {where}", f"'{first['msg']}'", "a passport of this version", "run again") from error


def file_digest(path: Path) -> str:
    """Return ``sha256:...`` of the bytes of `path`."""
    with open(path, "rb") as content:
        return f"sha256:{hashlib.file_digest(content, 'sha256').hexdigest()}"


def processor() -> str:
    """Return what this machine computes with: roundings in float are its own."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return " ".join([platform.machine(), *names[:1]])
