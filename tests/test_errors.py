from __future__ import annotations

import pytest

from hadaptive_q.errors import UserError, first_line, nearest


def test_a_user_error_is_one_line_in_a_fixed_order() -> None:
    error = UserError("recipe.yaml, fit", "'a\n\n  b'", "a number", "write one")
    assert str(error) == "recipe.yaml, fit: got 'a b'; expected a number; write one"
    assert (error.where, error.expected, error.remedy) == ("recipe.yaml, fit", "a number", "write one")


def test_without_a_remedy_nothing_is_appended() -> None:
    assert str(UserError("here", "this", "that")) == "here: got this; expected that"


def test_the_first_line_of_an_error_is_its_kind_where_it_says_nothing() -> None:
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(OSError()) == "OSError"


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("epoch", "did you mean 'epochs'?"),
        ("INT8", ""),  # case counts: names are written as they are
        ("completely different", ""),
    ],
)
def test_nearest_names_one_likely_choice_or_nothing(word: str, hint: str) -> None:
    assert nearest(word, ["epochs", "lr", "int8"]) == hint


def test_nearest_takes_any_iterable() -> None:
    assert nearest("glyph", {"digits": 1, "glyphs": 2}) == "did you mean 'glyphs'?"
    assert nearest("glyph", []) == ""
