from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from hadaptive_q.data.datasets import ImageData, TensorSplit, digest, held_out
from hadaptive_q.data.sources import open_data
from hadaptive_q.errors import UserError


def split_of(*identities: bytes) -> TensorSplit:
    count = len(identities)
    return TensorSplit(torch.zeros(count, 3, 2, 2, dtype=torch.uint8), [0] * count, identities)


def labels_of(data: ImageData) -> tuple[list[int], list[int]]:
    assert isinstance(data.train, TensorSplit)
    assert isinstance(data.val, TensorSplit)
    return data.train.labels, data.val.labels


def test_digits_are_all_there_once(digits: ImageData) -> None:
    train, val = labels_of(digits)
    assert len(train) + len(val) == 1797
    identities = [split.identity(i) for split in (digits.train, digits.val) for i in range(len(split))]
    assert {len(identity) for identity in identities} == {64}  # 8 x 8 pixels as scikit-learn stores them
    both = set(identities[: len(train)]) & set(identities[len(train) :])
    assert not both, "an image stands in both splits"


def test_digits_are_split_alike_in_every_class(digits: ImageData) -> None:
    train, val = map(Counter, labels_of(digits))
    assert set(train) == set(val) == set(range(10))
    for label in range(10):
        assert val[label] == round(0.2 * (train[label] + val[label]))


def test_digits_are_images_of_the_wanted_size(digits: ImageData) -> None:
    image, label = digits.train[0]
    assert (image.dtype, tuple(image.shape)) == (torch.uint8, (3, 32, 32))
    assert digits.preprocess.image_size == 32
    assert digits.preprocess.classes == tuple("0123456789")
    assert digits.num_classes == 10
    assert isinstance(label, int)
    assert torch.equal(image[0], image[1])
    assert torch.equal(image[0], image[2])
    assert isinstance(digits.train, TensorSplit)
    assert digits.train.images.min() == 0
    assert digits.train.images.max() >= 250  # the full range is used, though not by every image
    assert digits.mirror is False, "a mirrored 2 is no digit"


def test_digits_at_another_size_are_the_same_samples(digits: ImageData) -> None:
    small = open_data("digits", 8)
    assert small.train[0][0].shape == (3, 8, 8)
    assert labels_of(small) == labels_of(digits)
    assert digest(small.train, range(50)) == digest(digits.train, range(50))
    # At 8 x 8 nothing is resampled: the image is its identity, scaled from 0..16 to 0..255.
    raw = torch.tensor(list(small.train.identity(7))).reshape(8, 8) * (255 / 16)
    assert torch.equal(small.train[7][0][0], raw.round().to(torch.uint8))


def test_digest_is_over_samples_and_their_order() -> None:
    split = split_of(b"one", b"two", b"three")
    assert digest(split, [0, 1]).startswith("sha256:")
    assert digest(split, [0, 1]) == digest(split_of(b"one", b"two"), [0, 1])
    assert len({digest(split, indices) for indices in ([0, 1], [1, 0], [0], [0, 1, 2], [])}) == 5


def test_digest_knows_where_a_sample_ends() -> None:
    assert digest(split_of(b"ab", b"c"), [0, 1]) != digest(split_of(b"a", b"bc"), [0, 1])


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_takes_a_fifth_of_every_class(seed: int) -> None:
    labels = [0] * 50 + [1] * 10 + [2] * 3 + [3] * 2
    train, val = held_out(labels, seed)
    assert sorted(train + val) == list(range(len(labels)))
    assert train == sorted(train)
    assert val == sorted(val)
    assert Counter(labels[i] for i in val) == {0: 10, 1: 2, 2: 1, 3: 1}
    assert held_out(labels, seed) == (train, val)
    assert held_out(labels, seed + 10) != (train, val)


def test_held_out_leaves_the_only_sample_of_a_class_to_training() -> None:
    assert held_out([0, 0, 1]) in [([0, 2], [1]), ([1, 2], [0])]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("digit", "did you mean 'digits'?"),
        ("glyhps", "did you mean 'glyphs'?"),
        ("./nowhere/at/all", "existing folder"),
    ],
)
def test_unknown_data_is_answered_with_what_exists(name: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        open_data(name)
    assert f"--data: got {name!r}; expected digits, glyphs, hf:NAME" in str(caught.value)
    assert hint in str(caught.value)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(UserError, match="--data: got"):
        open_data(str(tmp_path / "x.png"))
