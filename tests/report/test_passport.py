"""A passport says what it said when it was written, and is found beside its file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from hadaptive_q.errors import UserError
from hadaptive_q.models.config import Preprocess
from hadaptive_q.report.passport import (
    FileAccuracy,
    Golden,
    Passport,
    drop_passport,
    file_digest,
    passport_path,
    read_passport,
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.pte"
    path.write_bytes(b"bytes of a model")
    Passport(
        file=path.name,
        bytes=path.stat().st_size,
        sha256=file_digest(path),
        model="hadaptive_net_s",
        data="digits",
        seed=0,
        recipe="int8",
        recipe_digest="sha256:0",
        calibration_digest=None,
        versions={"torch": "2.13.0"},
        processor="x86_64",
        preprocess=Preprocess(image_size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), classes=("0", "1")),
        input=None,
        wanted_arm_features=[],
        accuracy=FileAccuracy(top1=99.5, top5=100.0, samples=359),
        golden=Golden(logits=[[0.1, 1 / 3]], step=1 / 3),
    ).write(path)
    return path


def test_read_back_it_is_what_was_written(file: Path) -> None:
    passport = read_passport(file)
    assert passport.sha256 == f"sha256:{hashlib.sha256(b'bytes of a model').hexdigest()}"
    assert passport.golden.logits == [[0.1, 1 / 3]], "every bit of every logit"
    assert passport.digest == passport.own_digest()


def test_a_changed_field_changes_the_digest(file: Path) -> None:
    text = passport_path(file).read_text()
    assert text.count("99.5") == 1
    passport_path(file).write_text(text.replace("99.5", "99.9"))
    changed = read_passport(file)
    assert changed.accuracy.top1 == 99.9
    assert changed.digest != changed.own_digest()


@pytest.mark.parametrize("content", [b"", b"{}", b'{"file": 1}', b"\xff\xfe"])
def test_what_is_no_passport_is_refused(file: Path, content: bytes) -> None:
    passport_path(file).write_bytes(content)
    with pytest.raises(UserError, match=r"model\.pte\.passport\.json"):
        read_passport(file)


def test_a_missing_passport_is_named(file: Path) -> None:
    drop_passport(file)
    drop_passport(file)  # nothing there is nothing to do
    with pytest.raises(UserError, match=r"model\.pte\.passport\.json: got No such file"):
        read_passport(file)
