from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hadaptive_q.train.margin import margin_shortfall, score_gaps
from hadaptive_q.train.observe import Choice

SCORES = torch.tensor([[0.1, 0.7, 0.4, 0.0]])


def test_gaps_of_ranks_by_hand() -> None:
    torch.testing.assert_close(score_gaps(SCORES, SCORES, Choice(2, "rank")), torch.tensor([[0.3, 0.3]]))
    assert score_gaps(SCORES, SCORES, Choice(4, "rank")).shape == (1, 3)


def test_gaps_to_the_line_by_hand() -> None:
    # The line lies between 0.4 and 0.1.
    wanted = torch.tensor([[0.3, 0.9, 0.3, 0.5]])
    torch.testing.assert_close(score_gaps(SCORES, SCORES, Choice(2, "channel")), wanted)
    assert score_gaps(SCORES, SCORES, Choice(4, "channel")).shape == (1, 0)


def test_a_choice_against_the_wanted_one_counts_below_zero() -> None:
    wanted = torch.tensor([[0.4, 0.7, 0.1, 0.0]])  # channels 1 and 0, where the scores choose 1 and 2
    torch.testing.assert_close(score_gaps(SCORES, wanted, Choice(2, "rank")), torch.tensor([[0.6, -0.3]]))
    # Least chosen 0.1, largest refused 0.4: the line lies at 0.25 again, with both on the wrong side.
    gaps = score_gaps(SCORES, wanted, Choice(2, "channel"))
    torch.testing.assert_close(gaps, torch.tensor([[-0.3, 0.9, -0.3, 0.5]]))


@pytest.mark.parametrize("order", ["rank", "channel"])
def test_gaps_are_positive_where_both_choose_alike(order: str) -> None:
    scores = torch.randn(64, 20, generator=torch.Generator().manual_seed(0))
    assert (score_gaps(scores, scores, Choice(7, order)) > 0).all()  # type: ignore[arg-type]


def test_shortfall_is_its_formula() -> None:
    # Of the wanted 0.4, a quarter is missing twice; a second ACH with room enough misses nothing.
    wide = 10 * SCORES
    choices = [Choice(2, "rank"), Choice(2, "channel")]
    loss = margin_shortfall([SCORES, wide], [SCORES, wide], choices, 0.4)
    torch.testing.assert_close(loss, torch.tensor((0.25 + 0.25) / 2))


def test_no_choice_is_no_shortfall() -> None:
    assert float(margin_shortfall([], [], [], 0.1)) == 0


def _step(scores: Tensor, wanted: Tensor, choice: Choice) -> Tensor:
    scores = scores.clone().requires_grad_()
    margin_shortfall([scores], [wanted], [choice], 0.2).backward()
    assert scores.grad is not None
    return -scores.grad


def test_a_step_parts_near_ranks() -> None:
    scores = torch.tensor([[0.30, 0.31, 0.0]])
    step = _step(scores, scores, Choice(1, "rank"))
    assert step.tolist() == [[pytest.approx(-5.0), pytest.approx(5.0), 0.0]]


def test_a_step_clears_the_line_on_both_sides() -> None:
    scores = torch.tensor([[1.0, 0.55, 0.5, 0.45, 0.0]])
    step = _step(scores, scores, Choice(2, "channel"))
    assert step[0, 0] == step[0, 4] == 0  # far from the line at 0.525
    assert step[0, 1] > 0 > step[0, 2]
    assert step[0, 3] < 0


def test_a_step_goes_back_to_the_wanted_choice() -> None:
    step = _step(torch.tensor([[0.4, 0.5]]), torch.tensor([[0.5, 0.4]]), Choice(1, "channel"))
    assert step[0, 0] > 0 > step[0, 1]
