"""Right answers, packed and back."""

from __future__ import annotations

import numpy as np
import pytest

from hadaptive_q.report.answers import pack, record_answers, unpack


@pytest.mark.parametrize("count", [1, 7, 8, 9, 359])
def test_answers_come_back_as_they_were(count: int) -> None:
    right = np.random.default_rng(count).random(count) < 0.9
    assert (unpack(pack(right), count) == right).all()
    assert len(pack(right)) <= 4 * -(-count // 24) + 4


def test_a_record_counts_what_differs_and_knows_its_images() -> None:
    record = record_answers("images", [1, 2, 3, 4], [True, True, True, False], [True, False, False, True])
    assert (record.lost, record.won) == (2, 1)
    assert unpack(record.float_right, 4).tolist() == [True, True, True, False]
    assert unpack(record.pte_right, 4).tolist() == [True, False, False, True]
    same = record_answers("images", [1, 2, 3, 4], [True] * 4, [True] * 4)
    assert same.split == record.split
    assert record_answers("images", [1, 2, 3, 5], [True] * 4, [True] * 4).split != record.split
    assert record_answers("others", [1, 2, 3, 4], [True] * 4, [True] * 4).split != record.split


def test_another_number_of_answers_is_refused() -> None:
    with pytest.raises(ValueError, match="16 bits for 17"):
        unpack(pack(np.ones(16, dtype=bool)), 17)
