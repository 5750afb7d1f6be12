"""The table of costs covers every ACH of the published networks, and the choice follows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from hadaptive_q.models.config import VARIANTS, ACHConfig
from hadaptive_q.rewrite import pair_costs
from hadaptive_q.rewrite.pair_costs import FLOAT_EQUAL, cheapest_form, read_table
from hadaptive_q.rewrite.roll_pairs import FORMS


@pytest.mark.parametrize("name", ["hadaptive_net_s", "hadaptive_net_m", "hadaptive_net_l"])
def test_every_block_at_224_is_measured(name: str) -> None:
    config, pixels, wanted = VARIANTS[name], 224, set()
    for part in (*config.stem, *config.blocks):
        pixels //= getattr(part, "s", 1)
        if isinstance(part, ACHConfig):
            wanted.add((part.channels, part.cs, pixels, pixels))
    measured = {(b["channels"], b["cs"], b["height"], b["width"]) for b in read_table() if name in b["models"]}
    assert measured == wanted


def test_every_measured_block_takes_its_own_cheapest_form() -> None:
    cores = {tuple(sorted(by_core)) for block in read_table() for by_core in block["instructions"].values()}
    assert cores == {("cortex-a53", "cortex-a76")}
    for block in read_table():
        form = cheapest_form(block["cs"], block["height"], block["width"])
        assert form in FORMS, "the table asks for a form that nobody wrote"
        for core, count in block["instructions"][form].items():
            assert 0 < count <= min(block["instructions"][other][core] for other in FLOAT_EQUAL)


def test_forms_that_never_win_are_not_written() -> None:
    assert set(FORMS) == {cheapest_form(b["cs"], b["height"], b["width"]) for b in read_table()}


def test_unknown_shapes_take_the_nearest_measured_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def block(cs: int, side: int, rolled: int) -> dict[str, object]:
        costs = {"rolled": rolled, "row broadcast": 50, "one-hot float": 70}
        by_form = {form: {"a": count // 2, "b": count // 2} for form, count in costs.items()}
        return {"cs": cs, "height": side, "width": side, "instructions": by_form}

    monkeypatch.setattr(pair_costs, "read_table", lambda: (block(16, 14, 40), block(32, 7, 60)))
    assert cheapest_form(16, 14, 14) == cheapest_form(12, 20, 10) == "rolled"
    assert cheapest_form(32, 7, 7) == cheapest_form(36, 3, 3) == "row broadcast"


def test_the_table_says_how_it_was_made() -> None:
    assert Path(__file__).parents[2].joinpath("benchmarks", "pair_forms.py").is_file()
    assert '"made_by": "python benchmarks/pair_forms.py"' in pair_costs.TABLE.read_text()
