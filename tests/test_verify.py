"""Every file of a run is what its passport says, and each way it can stop being so is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hadaptive_q.errors import UserError
from hadaptive_q.report.passport import Passport, passport_path, read_passport
from hadaptive_q.verify import verify


@pytest.fixture
def folder(nano_run: Any, tmp_path: Path) -> Path:
    """A copy of a finished run, to be damaged."""
    return Path(shutil.copytree(nano_run.folder, tmp_path / "run"))


def rewrite(file: Path, **fields: object) -> None:
    """Give the passport of `file` other fields and a digest that fits them."""
    content = json.loads(passport_path(file).read_text())
    Passport.model_validate({**content, **fields}).write(file)


def test_a_finished_run_is_itself(nano_run: Any) -> None:
    verdicts = verify(nano_run.folder)
    names = [Path(verdict["file"]).name for verdict in verdicts]
    assert names == ["float.pte", "float.safetensors", "model.pte", "quantized.safetensors"]
    assert [verdict["problems"] for verdict in verdicts] == [[]] * 4
    assert verdicts[2]["notes"] == ["the same logits on the golden images, bit for bit"]


def test_passports_say_what_the_report_says(nano_run: Any) -> None:
    report = nano_run.report
    passport = read_passport(nano_run.folder / "model.pte")
    assert passport.accuracy.top1 == report.accuracy.pte_top1
    assert passport.accuracy.samples == report.accuracy.samples
    assert (passport.recipe_digest, passport.calibration_digest) == (report.recipe_digest, report.calibration_digest)
    assert passport.versions == report.versions
    assert passport.bytes == report.size.pte_bytes
    assert read_passport(nano_run.folder / "quantized.safetensors").accuracy.top1 == report.accuracy.quantized_top1
    assert read_passport(nano_run.folder / "float.safetensors").accuracy.top1 == report.accuracy.float_top1


@pytest.mark.parametrize("name", ["model.pte", "float.pte", "float.safetensors", "quantized.safetensors"])
def test_a_changed_byte_is_caught_and_not_run(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    (verdict,) = verify(folder / name)
    assert verdict["problems"] == ["its bytes are not those that were measured"]
    assert verdict["notes"] == []


def test_a_cut_file_is_caught(folder: Path) -> None:
    content = (folder / "model.pte").read_bytes()
    (folder / "model.pte").write_bytes(content[:-1])
    (verdict,) = verify(folder / "model.pte")
    assert verdict["problems"] == [f"{len(content) - 1:,} bytes, and {len(content):,} when it was measured"]


def test_a_changed_passport_is_caught(folder: Path) -> None:
    path = passport_path(folder / "model.pte")
    content = json.loads(path.read_text())
    content["accuracy"]["top1"] += 1
    path.write_text(json.dumps(content))
    (verdict,) = verify(folder / "model.pte")
    assert verdict["problems"] == ["model.pte.passport.json was changed: its digest is not that of its content"]


def test_another_recipe_beside_it_is_caught(folder: Path) -> None:
    recipe = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(recipe.replace("seed: 0", "seed: 1", 1))
    (verdict,) = verify(folder / "float.safetensors")
    assert verdict["problems"] == ["recipe.yaml beside it is not the recipe it was made by (int8_ptq)"]


def test_other_answers_are_caught_here_and_allowed_within_two_codes_elsewhere(folder: Path) -> None:
    file = folder / "model.pte"
    golden = json.loads(passport_path(file).read_text())["golden"]
    row = golden["logits"][0]
    lowest = row.index(min(row))
    row[lowest] -= 2 * golden["step"]
    rewrite(file, golden=golden)
    (verdict,) = verify(file)
    assert verdict["problems"] == ["logits on the golden images off by 2 codes"]

    rewrite(file, golden=golden, processor="another")
    (verdict,) = verify(file)
    assert (verdict["problems"], verdict["notes"]) == ([], ["logits on the golden images within 2 codes"])

    row[lowest] -= golden["step"]
    rewrite(file, golden=golden, processor="another")
    (verdict,) = verify(file)
    assert verdict["problems"] == ["logits on the golden images off by 3 codes; measured on another"]


def test_a_neighbour_it_is_rebuilt_from_counts(folder: Path) -> None:
    (folder / "float.safetensors").unlink()
    verdicts = {Path(v["file"]).name: v["problems"] for v in verify(folder)}
    assert verdicts["float.safetensors"] == ["it is gone: only its passport is here"]
    assert len(verdicts["quantized.safetensors"]) == 1
    assert "no float.safetensors" in verdicts["quantized.safetensors"][0]
    assert verdicts["model.pte"] == []


def test_what_has_no_passport_is_refused(folder: Path, tmp_path: Path) -> None:
    passport_path(folder / "model.pte").unlink()
    with pytest.raises(UserError, match=r"model\.pte\.passport\.json: got No such file"):
        verify(folder / "model.pte")
    with pytest.raises(UserError, match="got no such file"):
        verify(tmp_path / "nothing.pte")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="got no model files"):
        verify(tmp_path / "empty")
