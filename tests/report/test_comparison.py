"""The record of a comparison, its fronts, its plots and its pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from hadaptive_q.report.comparison import ComparedModel, Comparison, DropRecord, FailedModel, InstructionRecord, fronts
from hadaptive_q.report.comparison_listing import comparison_listing
from hadaptive_q.report.front_plot import front_plot
from hadaptive_q.report.listing import WIDTH
from hadaptive_q.report.record import Accuracy, Latency
from hadaptive_q.report.render import write_comparison_pages


def model(name: str, top1: float, instructions: int, size: int) -> ComparedModel:
    return ComparedModel(
        name=name,
        run=f"{name} & co",
        model="hadaptive_net_s",
        recipe="int8",
        recipe_digest="sha256:" + "0" * 64,
        seed=0,
        image_size=224,
        params=12_345_678,
        macs=123_400_000,
        accuracy=Accuracy(
            samples=5000, float_top1=98.0, quantized_top1=top1, pte_top1=top1, float_top5=99, pte_top5=99
        ),
        drop=DropRecord(points=98.0 - top1, low=-1.25, high=12.5),
        float_agreement=0.9876,
        float_sqnr_db=23.45,
        pte_bytes=size,
        float_pte_bytes=4 * size,
        instructions=InstructionRecord(pte=instructions, float_pte=2 * instructions),
        latency=Latency(
            host_ms_median=12.345, host_ms_spread=0.1, float_host_ms_median=24.69, float_host_ms_spread=0.2
        ),
        latency_ratio=1.0,
        float_latency_ratio=2.0,
        delegates=1,
        portable_ops=["aten::topk", "aten::topk"],
    )


@pytest.fixture
def record() -> Comparison:
    return Comparison(
        data="<b>digits</b>",
        split="sha256:" + "1" * 64,
        core="cortex-a76",
        instructions_absent="",
        versions={"python": "3"},
        models=[
            model("mobilenet_v3_small_ach", 97.0, 24_742_837, 2_000_000),
            model("hadaptive_net_s", 97.0, 30_000_000, 1_500_000),
            model("starnet_s1", 96.0, 20_000_000, 2_500_000),
        ],
        failed=[FailedModel(name="broken", error="model broken: got nothing; expected <something>")],
    )


def names(models: list[ComparedModel]) -> list[str]:
    return [each.name for each in models]


def test_fronts_hold_what_nothing_beats(record: Comparison) -> None:
    found = {kind: names(best) for kind, best in fronts(record).items()}
    assert found == {"instructions": ["starnet_s1", "mobilenet_v3_small_ach"], "bytes": ["hadaptive_net_s"]}


def test_equals_are_both_on_the_front(record: Comparison) -> None:
    twins = [model(name, 97.0, 10, 10) for name in ("a", "b")]
    found = fronts(record.model_copy(update={"models": [*record.models, *twins]}))
    assert names(found["bytes"]) == names(found["instructions"]) == ["a", "b"]


def test_pages_hold_the_figures(record: Comparison, tmp_path: Path) -> None:
    write_comparison_pages(record, tmp_path)
    figures = ("97.00", "+1.00", "-1.25", "12.50", "98.76", "12,345,678", "123.4", "0.250", "12.345", "0.500")
    for name in ("compare.md", "compare.html"):
        page = (tmp_path / name).read_text()
        for text in (*figures, "aten::topk 2x", "starnet_s1, mobilenet_v3_small_ach", "cortex-a76", "broken"):
            assert text in page, f"{text} not in {name}"
    assert page.count("<svg") == 2
    assert "<b>digits" not in page
    assert 'href="starnet_s1%20%26%20co/report.html"' in page
    assert "24.74 M" in page
    assert "24,742,837" in (tmp_path / "compare.md").read_text()


def test_without_an_emulator_everything_says_so(record: Comparison, tmp_path: Path) -> None:
    bare = [each.model_copy(update={"instructions": None}) for each in record.models]
    record = record.model_copy(update={"models": bare, "instructions_absent": "no emulator"})
    assert list(fronts(record)) == ["bytes"]
    write_comparison_pages(record, tmp_path)
    for page in ((tmp_path / "compare.md").read_text(), (tmp_path / "compare.html").read_text()):
        assert "no emulator" in page
        assert "cortex-a76" not in page
    assert page.count("<svg") == 1
    assert "instructions: none counted, no emulator" in comparison_listing(record)


def test_the_listing_fits_a_terminal(record: Comparison) -> None:
    lines = comparison_listing(record).splitlines()
    assert max(map(len, lines)) <= WIDTH
    (answers, costs) = (line.split() for line in lines if line.endswith("  mobilenet_v3_small_ach"))
    assert answers[:5] == ["98.00", "97.00", "+1.00", "(-1.25", "to"]
    assert costs[:7] == ["12,345,678", "123.4", "M", "2,000,000", "0.250", "24.74", "0.500"]
    assert lines[-1] == "broken failed: model broken: got nothing; expected <something>"
    assert "front of accuracy and bytes: hadaptive_net_s" in lines


def test_a_record_survives_a_round_trip(record: Comparison) -> None:
    assert Comparison.model_validate_json(record.model_dump_json()) == record


def test_same_models_same_plot(record: Comparison) -> None:
    one, other = (front_plot(record.models, lambda each: each.pte_bytes, "MB") for _ in range(2))
    assert one == other
    assert one.startswith("<svg")
