from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from hadaptive_q.data.calibration import Manifest, batches, find_manifest, read_manifest, resolve
from hadaptive_q.data.datasets import ImageData, TensorSplit, digest
from hadaptive_q.data.sources import open_data
from hadaptive_q.data.transforms import normalise
from hadaptive_q.errors import UserError
from hadaptive_q.recipe import shipped


@pytest.mark.parametrize("name", shipped("calib"))
def test_shipped_manifest_resolves(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = open_data(name, 32)
    manifest = find_manifest("auto", data)
    assert manifest == read_manifest(shipped("calib")[name])
    assert manifest.digest is not None, "a shipped manifest knows its samples"

    resolved = resolve(manifest, data)
    assert resolved.indices is not None
    assert len(set(resolved.indices)) == manifest.count
    assert len({data.train[i][1] for i in resolved.indices}) == data.num_classes, "a class is never calibrated"


def test_every_embedded_set_has_a_manifest_of_its_name() -> None:
    assert {"digits", "glyphs"} <= set(shipped("calib"))


def test_a_resolved_manifest_says_everything_and_reads_back(digits: ImageData, tmp_path: Path) -> None:
    drawn = Manifest(source="digits", count=20, seed=3)
    resolved = resolve(drawn, digits)
    assert resolved.indices is not None
    assert (resolved.count, len(resolved.indices)) == (None, 20)
    assert list(resolved.indices) == sorted(set(resolved.indices))
    assert resolved.digest == digest(digits.train, resolved.indices)

    path = tmp_path / "calibration.yaml"
    path.write_text(resolved.to_yaml())
    assert read_manifest(path) == resolved
    assert resolve(find_manifest(str(path), digits), digits) == resolved
    assert "null" not in path.read_text()


def test_the_seed_decides_the_draw(digits: ImageData) -> None:
    one, again, other = (resolve(Manifest(source="digits", count=20, seed=s), digits) for s in (3, 3, 4))
    assert one == again
    assert one.indices != other.indices


def test_calibration_may_use_the_validation_split(digits: ImageData) -> None:
    resolved = resolve(Manifest(source="digits", split="val", indices=(5, 1)), digits)
    assert resolved.indices == (5, 1), "given indices keep their order"
    assert resolved.digest == digest(digits.val, [5, 1])


@pytest.mark.parametrize("count", [30, 1000])
def test_data_without_a_manifest_is_drawn_anew(count: int, digits: ImageData) -> None:
    assert isinstance(digits.train, TensorSplit)
    split = TensorSplit(digits.train.images[:count], digits.train.labels[:count], digits.train.identities[:count])
    data = ImageData("./my images", digits.preprocess, split, digits.val, mirror=True)
    assert find_manifest("auto", data) == Manifest(source="./my images", count=min(512, count))


@pytest.mark.parametrize("batch_size", [1, 4, 10, 64])
def test_batches_are_the_chosen_samples_as_network_inputs(batch_size: int, few_digits: ImageData) -> None:
    indices = (3, 1, 40, 41, 42, 43, 44, 45, 46, 95)
    manifest = resolve(Manifest(source="digits", indices=indices), few_digits)
    found = list(batches(manifest, few_digits, batch_size))
    assert [len(batch) for batch in found[:-1]] == [batch_size] * (len(found) - 1)
    wanted = normalise(torch.stack([few_digits.train[i][0] for i in indices]), few_digits.preprocess)
    assert torch.equal(torch.cat(found), wanted)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"source": "glyphs", "count": 5},
            "got data digits; expected data glyphs; choose another calibration.manifest",
        ),
        ({"source": "digits", "count": 97}, "got count 97; expected at most 96, the size of the train split"),
        ({"source": "digits", "split": "val", "count": 49}, "expected at most 48, the size of the val split"),
        ({"source": "digits", "indices": (0, 96)}, "got index 96; expected below 96, the size of the train split"),
        ({"source": "digits", "count": 9, "digest": "sha256:" + "0" * 64}, "the data changed: make a new manifest"),
    ],
)
def test_a_manifest_that_does_not_fit_the_data(fields: dict[str, object], message: str, few_digits: ImageData) -> None:
    with pytest.raises(UserError) as caught:
        resolve(Manifest.model_validate(fields), few_digits)
    assert f"calibration manifest for {fields['source']}: " in str(caught.value)
    assert message in str(caught.value)


def test_changed_samples_are_noticed(few_digits: ImageData) -> None:
    assert isinstance(few_digits.train, TensorSplit)
    resolved = resolve(Manifest(source="digits", indices=(0, 1)), few_digits)
    train = few_digits.train
    changed = TensorSplit(train.images, train.labels, [b"another", *train.identities[1:]])
    with pytest.raises(UserError, match="the data changed"):
        resolve(resolved, ImageData("digits", few_digits.preprocess, changed, few_digits.val, mirror=False))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("source: digits\n", "manifest: got"),
        ("source: digits\ncount: 5\nindices: [1]\n", "either count or indices"),
        ("source: digits\ncount: 0\n", "count: got 0"),
        ("source: digits\nindices: []\n", "indices: got []"),
        ("source: digits\nindices: [-1]\n", "indices.0: got -1"),
        ("source: digits\ncount: 5\nsplit: test\n", "split: got 'test'"),
        ("source: digits\ncount: 5\nsamples: 3\n", "samples: got 3"),
        ("count: 5\n", "source: got"),
        ("- 1\n", "got list; expected a mapping"),
        ("count: [\n", "expected plain YAML"),
    ],
)
def test_a_wrong_manifest_is_explained(text: str, message: str, few_digits: ImageData, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        find_manifest(str(path), few_digits)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


def test_an_unknown_manifest_is_answered_with_the_known_ones(few_digits: ImageData) -> None:
    with pytest.raises(
        UserError, match=r"calibration\.manifest digit: got no such manifest; expected auto, digits"
    ) as e:
        find_manifest("digit", few_digits)
    assert "did you mean 'digits'?" in str(e.value)


def test_manifests_in_git_hold_no_images() -> None:
    for path in shipped("calib").values():
        assert path.stat().st_size < 1000
        assert set(yaml.safe_load(path.read_text())) <= set(Manifest.model_fields)
