"""The text of an explanation: aligned, within a terminal, the most blamed first."""

from __future__ import annotations

import pytest

from hadaptive_q.report.explanation import (
    AchExplanation,
    Blame,
    Explanation,
    FloatIsland,
    Logits,
    RoundedTensor,
)
from hadaptive_q.report.listing import SHOWN, WIDTH, listing, tensor_label


def tensor(index: int, kind: str = "activation") -> RoundedTensor:
    return RoundedTensor(
        layer="blocks.10.expansion.primary.conv",
        name="blocks_10_expansion_primary_conv_weight_folded" if kind == "weight" else f"conv2d_{index}",
        kind=kind,
        tensors=[f"conv2d_{index}"],
        format="int8",
        granularity="per channel" if kind == "weight" else "per tensor",
        low=-0.375,
        high=123.0,
        scale=0.0123,
        smallest_scale=0.0123,
        zero_point=-128,
        clipped=0.1234,
        sqnr_db=float("inf"),
        blame=Blame(alone_db=37.5, gained_db=-0.41, share=0.9 - index / 100, held_share=0.0123),
    )


def explanation(held_db: float = 20.0, count: int = 40) -> Explanation:
    ach = AchExplanation(
        name="blocks.10.expansion",
        selection="dynamic",
        flip_rate=0.123,
        rank_flip_rate=0.75,
        train_eval_overlap=None,
        operand_sqnr_db=-2.5,
        product_sqnr_db=3.0,
        output_sqnr_db=4.0,
        mixed_max=7.0,
        product_max=49.0,
        normed_max=1.0,
        operand_scale=0.04,
        output_scale=0.008,
        scale_ratio=0.2,
        rank_gap=0.052,
        score_error=None,
        tau=3.5,
        slope=None,
        bias_max=0.25,
    )
    return Explanation(
        model="hadaptive_net_s",
        recipe="int8",
        recipe_digest="sha256:0",
        data="glyphs",
        samples=64,
        logits=Logits(program_to_float_db=9.0, parameters_db=12.0, rounding_db=10.0, held_db=held_db),
        tensors=[tensor(index, "weight" if index == 1 else "activation") for index in range(count)],
        ach=[ach],
        float_islands=[FloatIsland(layer="tail.act", operators={"hardswish": 1, "mul": 10})],
    )


def test_lines_fit_and_columns_align() -> None:
    lines = listing(explanation(), whole=True).splitlines()
    assert max(map(len, lines)) <= WIDTH
    header = next(line for line in lines if line.startswith("share"))
    rows = [line for line in lines if "blocks.10.expansion.primary.conv: " in line]
    assert len(rows) == 40
    assert {row.index("blocks.10") for row in rows} == {header.index("layer: tensor")}
    assert rows[0].split() == [
        *("90.0", "1.23", "37.5", "-0.41", "inf", "12.34", "-0.375", "123", "1.2e-02", "-128"),
        *("blocks.10.expansion.primary.conv:", "conv2d_0"),
    ]
    (ach,) = [line for line in lines if line.endswith("dynamic  blocks.10.expansion")]
    assert ach.split() == [
        "0.200",
        "-2.5",
        "3.0",
        "4.0",
        "12.3",
        "75.0",
        "0.052",
        "3.50",
        "0.250",
        "dynamic",
        ach.split()[-1],
    ]
    assert "  tail.act: hardswish, mul 10x" in lines


def test_the_rest_is_counted() -> None:
    text = listing(explanation(), whole=False)
    assert text.count("blocks.10.expansion.primary.conv: ") == SHOWN
    assert f"{40 - SHOWN} more, each at most {90 - SHOWN:.1f} %" in text
    assert "more, each" not in listing(explanation(count=SHOWN), whole=False)


@pytest.mark.parametrize("held_db", [20.0, 10.0])
def test_held_selections_are_shown_where_there_are_any(held_db: float) -> None:
    text = listing(explanation(held_db), whole=True)
    assert ("90 % of the noise comes with swapped channels" in text) == (held_db == 20)
    assert ("held" in text) == (held_db == 20)
    assert ("own scores" in text) == (held_db == 20)


def test_label_does_not_repeat_the_layer() -> None:
    assert tensor_label(tensor(0, "weight")) == "blocks.10.expansion.primary.conv: weight"
    assert tensor_label(tensor(3)) == "blocks.10.expansion.primary.conv: conv2d_3"
