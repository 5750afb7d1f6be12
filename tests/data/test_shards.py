from __future__ import annotations

from pathlib import Path

import pytest

from hadaptive_q.data.shards import shards_by_split
from hadaptive_q.errors import UserError


def test_names_say_the_split() -> None:
    names = ["val-1.tar", "train-00001-of-00002.tar", "train-00000-of-00002.tar", "images.tar"]
    assert shards_by_split([Path(name) for name in names], "here") == {
        "train": ["images.tar", "train-00000-of-00002.tar", "train-00001-of-00002.tar"],
        "val": ["val-1.tar"],
    }


@pytest.mark.parametrize(("there", "missing"), [([1, 2], "0"), ([0, 2], "1"), ([0], "1, 2"), ([], "")])
def test_missing_shards_are_named(there: list[int], missing: str) -> None:
    shards = [Path(f"train-{number:05}-of-00003.parquet") for number in there]
    if not missing:
        assert shards_by_split(shards, "here") == {}
        return
    with pytest.raises(UserError, match=f"here: got no shard {missing} of train; expected all 3, counted from 0"):
        shards_by_split(shards, "here")


def test_of_many_missing_some_are_named() -> None:
    with pytest.raises(UserError, match=r"got no shard 0, 1, 2, \.\.\. of val; expected all 9"):
        shards_by_split([Path("val-8-of-9.tar")], "here")
