"""What `explain` says of a finished run of the nano network, against the run itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hadaptive_q.data.transforms import normalise
from hadaptive_q.errors import UserError
from hadaptive_q.explain import explain, write_explanation
from hadaptive_q.lower.parity import sqnr_db
from hadaptive_q.models.checkpoint import load_model
from hadaptive_q.quant.sites import find_sites
from hadaptive_q.report.explanation import Explanation
from hadaptive_q.restore import FinishedRun, open_run

SAMPLES = 32


@pytest.fixture(scope="module")
def finished(nano_run: Any) -> FinishedRun:
    return open_run(nano_run.folder)


@pytest.fixture(scope="module")
def explanation(finished: FinishedRun) -> Explanation:
    return explain(finished, samples=SAMPLES)


def images(run: FinishedRun, count: int) -> torch.Tensor:
    """Network inputs of every n-th validation image, `count` of them."""
    val = run.data.val
    return normalise(torch.stack([val[i * len(val) // count][0] for i in range(count)]), run.data.preprocess)


def test_logits_by_hand(nano_run: Any, finished: FinishedRun, explanation: Explanation) -> None:
    inputs = images(finished, SAMPLES)
    network = load_model(nano_run.folder / "float.safetensors")
    graph = open_run(nano_run.folder).calibrated.graph
    with torch.no_grad():
        reference = network(inputs)
        for site in find_sites(graph):
            site.switch(False)
        plain = graph(inputs)
    rounded = nano_run.program(inputs)
    logits = explanation.logits
    assert explanation.samples == SAMPLES
    assert logits.program_to_float_db == pytest.approx(sqnr_db(reference, rounded), abs=0.01)
    assert logits.rounding_db == pytest.approx(sqnr_db(plain, rounded), abs=0.01)
    # Calibration alone moved biases onto their grid, and no weight.
    assert logits.parameters_db == pytest.approx(sqnr_db(reference, plain), abs=0.5)
    assert logits.parameters_db > 30
    assert logits.held_db >= logits.rounding_db
    assert explanation.swapped_share == pytest.approx(1 - 10 ** ((logits.rounding_db - logits.held_db) / 10))


def test_every_site_is_described_most_blamed_first(finished: FinishedRun, explanation: Explanation) -> None:
    sites = find_sites(finished.calibrated.graph)
    assert sorted(site.tensors for site in sites) == sorted(tuple(t.tensors) for t in explanation.tensors)
    shares = [tensor.blame.share for tensor in explanation.tensors]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0
    for tensor in explanation.tensors:
        noise = tensor.blame.share * 10 ** (-explanation.logits.rounding_db / 10)
        if noise:
            assert tensor.blame.alone_db == pytest.approx(-10 * torch.tensor(noise).log10().item(), abs=1e-3)
    assert [ach.name for ach in explanation.ach] == [name for name, _ in finished.model.ach_modules()]


def test_quantizing_one_weight_alone_by_hand(nano_run: Any, finished: FinishedRun, explanation: Explanation) -> None:
    """No switch involved: the weight is written rounded into a graph that rounds nothing."""
    (tensor,) = [t for t in explanation.tensors if t.kind == "weight" and t.layer == "blocks.1.projection.conv"]
    graph = open_run(nano_run.folder).calibrated.graph
    for site in find_sites(graph):
        site.switch(False)
    inputs = images(finished, SAMPLES)
    name = next(str(node.target) for node in graph.graph.nodes if node.name == tensor.name)
    with torch.no_grad():
        plain = graph(inputs)
        weight = graph.get_parameter(name)
        scale = weight.abs().amax(dim=(1, 2, 3), keepdim=True) / 127
        weight.copy_((weight / scale).round() * scale)
        assert tensor.blame.alone_db == pytest.approx(sqnr_db(plain, graph(inputs)), abs=0.05)


@pytest.mark.parametrize("name", ["blocks.2.expansion", "blocks.2", "blocks.2.expansion.pointwise", "head"])
def test_a_layer_and_what_is_inside(name: str, finished: FinishedRun, explanation: Explanation) -> None:
    part = explain(finished, [name], SAMPLES)
    inside = [t for t in explanation.tensors if t.layer == name or t.layer.startswith(f"{name}.")]
    assert inside
    assert part.tensors == inside
    assert part.logits == explanation.logits
    assert [a.name for a in part.ach] == [a.name for a in explanation.ach if f"{a.name}.".startswith(f"{name}.")]


def test_a_layer_that_computes_in_float(finished: FinishedRun) -> None:
    part = explain(finished, ["blocks.2.expansion.scorer"], 4)
    assert part.tensors == part.ach == []
    assert [island.layer for island in part.float_islands] == ["blocks.2.expansion.scorer"]


@pytest.mark.parametrize(("name", "hint"), [("blocks.2.expansio", "'blocks.2.expansion'"), ("blocks.22", "'blocks.2'")])
def test_unknown_layer(name: str, hint: str, finished: FinishedRun) -> None:
    with pytest.raises(UserError, match=f"--layer {name}.*no such layer.*did you mean {hint}"):
        explain(finished, ["head", name], 4)


def test_more_samples_than_images(finished: FinishedRun) -> None:
    assert explain(finished, ["tail"], 10_000).samples == len(finished.data.val)


def test_it_goes_into_the_report(nano_run: Any, explanation: Explanation, tmp_path: Path) -> None:
    shutil.copytree(nano_run.folder, tmp_path / "run")
    page = tmp_path / "run" / "report.html"
    assert "hadaptive-q explain" in page.read_text()
    write_explanation(open_run(tmp_path / "run"), explanation)
    assert Explanation.model_validate_json((tmp_path / "run" / "explain.json").read_text()) == explanation
    assert page.read_text().count("<svg") == 4
    share = f"{100 * explanation.tensors[0].blame.share:.1f}"
    for name in ("report.html", "report.md"):
        text = (tmp_path / "run" / name).read_text()
        assert explanation.tensors[0].layer in text
        assert share in text
    # The record of the run itself stays as it was.
    before, after = ((folder / "report.json").read_text() for folder in (nano_run.folder, tmp_path / "run"))
    assert json.loads(after) == json.loads(before)
