"""The pages say what the record says, with nothing a name could smuggle in."""

from __future__ import annotations

from pathlib import Path

import pytest

from hadaptive_q.report import record
from hadaptive_q.report.render import write_report_pages


@pytest.fixture
def report() -> record.Report:
    ach = record.AchRecord(
        name="blocks.2.expansion",
        selection="dynamic",
        flip_rate=0.01,
        rank_flip_rate=0.25,
        train_eval_overlap=None,
        operand_sqnr_db=38.0,
        product_sqnr_db=30.0,
        output_sqnr_db=42.5,
        mixed_max=7.0,
        product_max=49.0,
        normed_max=0.98,
    )
    layers = [
        record.LayerRecord(name=f"conv_{i}", origin=f"blocks.{i}", sqnr_db=20.0 + i, low=-1.0, high=1.0, scale=0.01)
        for i in range(12)
    ]
    return record.Report(
        model="hadaptive_net_nano",
        recipe="int8",
        recipe_digest="sha256:" + "0" * 64,
        calibration_digest="sha256:" + "1" * 64,
        data="<script>alert(1)</script>",
        seed=3,
        versions=record.versions(),
        accuracy=record.Accuracy(
            samples=100, float_top1=95.0, quantized_top1=94.5, pte_top1=94.25, float_top5=99.0, pte_top5=99.0
        ),
        size=record.Size(float_pte_bytes=8_000_000, pte_bytes=2_000_000, pte_deflated_bytes=1_900_000),
        parity=record.ParityRecord(
            top1_agreement=0.995,
            changed_fraction=0.5,
            max_codes=3,
            sqnr_db=30.0,
            float_agreement=0.99,
            float_sqnr_db=float("inf"),
        ),
        coverage=record.CoverageRecord(delegates=7, portable_ops=["topk", "topk"], fp32_ops=["mul"]),
        ach=[ach],
        layers=layers,
        latency=record.Latency(
            host_ms_median=0.5, host_ms_spread=0.01, float_host_ms_median=0.6, float_host_ms_spread=0.02
        ),
    )


def test_pages_hold_the_figures(report: record.Report, tmp_path: Path) -> None:
    write_report_pages(report, tmp_path)
    for name in ("report.md", "report.html"):
        page = (tmp_path / name).read_text()
        for figure in ("94.25", "2.000 MB", "99.50", "42.5", "topk 2x"):
            assert figure in page, f"{figure} not in {name}"
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "<script>" not in page
    assert "conv_0" in page  # the weakest is listed, the strongest is not
    assert "conv_11" not in page.split("ten weakest")[1]


def test_pages_of_a_network_without_ach_have_none_of_its_tables(report: record.Report, tmp_path: Path) -> None:
    write_report_pages(report, tmp_path)
    with_ach = (tmp_path / "report.md").read_text() + (tmp_path / "report.html").read_text()
    assert "| ACH |" in with_ach
    assert "Cross-Hadamard" in with_ach
    write_report_pages(report.model_copy(update={"ach": []}), tmp_path)
    without = (tmp_path / "report.md").read_text() + (tmp_path / "report.html").read_text()
    assert "ACH" not in without
    assert "Cross-Hadamard" not in without
    assert "Layer by layer" in without


def test_pages_say_what_the_file_takes(report: record.Report, tmp_path: Path) -> None:
    assert report.input is None, "reports from before it was recorded"
    taken = record.InputRecord(dtype="uint8", shape=[1, 64, 64, 3])
    write_report_pages(report.model_copy(update={"input": taken}), tmp_path)
    for name in ("report.md", "report.html"):
        page = (tmp_path / name).read_text()
        assert "uint8 (1, 64, 64, 3)" in page
        assert "normalised inside" in page


def test_record_survives_a_round_trip(report: record.Report, tmp_path: Path) -> None:
    report.write(tmp_path / "report.json")
    again = record.Report.model_validate_json((tmp_path / "report.json").read_text())
    assert again == report


def test_same_record_same_bytes(report: record.Report, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_report_pages(report, tmp_path / name)
    assert (tmp_path / "a" / "report.html").read_bytes() == (tmp_path / "b" / "report.html").read_bytes()
