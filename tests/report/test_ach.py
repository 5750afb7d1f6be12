"""Scale ratio, rank gap and score error of every ACH against the network itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hadaptive_q.data.datasets import ImageData
from hadaptive_q.models.hadaptive_net import HadaptiveNet
from hadaptive_q.quant.backends import torchao_pt2e as backend
from hadaptive_q.quant.plan import make_plan
from hadaptive_q.quant.sites import find_sites
from hadaptive_q.recipe import QuantizeConfig
from hadaptive_q.report.ach import explain_ach, score_margins
from hadaptive_q.report.explanation import AchExplanation
from hadaptive_q.report.measure import measure_ach, measure_layers
from hadaptive_q.rewrite.deploy import deploy_graph

OVERLAPS = {"blocks.2.expansion": 0.5}


def explained(
    selection: str, make_nano: Callable[..., HadaptiveNet], inputs: Tensor, data: ImageData
) -> tuple[HadaptiveNet, list[AchExplanation], dict[tuple[str, str], float]]:
    """Return the network, what is said of it, and the scale of every activation by (layer, tensor)."""
    model = make_nano(selection)
    deploy, graph = deploy_graph(model, data.preprocess.image_size), deploy_graph(model, data.preprocess.image_size)
    ready = backend.calibrate(backend.prepare(graph, make_plan(graph, QuantizeConfig()), "mse"), [inputs])
    scales = {
        (site.layer, name): float(site.quantizer.calculate_qparams()[0])
        for site in find_sites(ready.graph)
        if site.kind == "activation"
        for name in site.tensors
    }
    program = backend.convert(ready, data.preprocess)
    layers = measure_layers(deploy, program, inputs)
    found = explain_ach(model, deploy, program, layers, inputs, OVERLAPS)
    assert [(a.flip_rate, a.output_sqnr_db, a.train_eval_overlap) for a in found] == [
        (a.flip_rate, a.output_sqnr_db, a.train_eval_overlap) for a in measure_ach(deploy, program, inputs, OVERLAPS)
    ]
    return model, found, scales


def test_dynamic(make_nano: Callable[..., HadaptiveNet], inputs: Tensor, few_digits: ImageData) -> None:
    model, found, scales = explained("rank", make_nano, inputs, few_digits)
    modules = dict(model.ach_modules())
    assert [ach.name for ach in found] == list(modules)
    for ach in found:
        module = modules[ach.name]
        (operand,) = [scale for (layer, _), scale in scales.items() if layer == f"{ach.name}.pointwise"]
        (output,) = [scale for (layer, _), scale in scales.items() if layer == f"{ach.name}.norm"]
        assert (ach.operand_scale, ach.output_scale) == pytest.approx((operand, output))
        assert ach.scale_ratio == pytest.approx(operand**2 / output)
        assert ach.tau == float(module.scorer.tau)
        assert ach.bias_max == float(module.norm.bias.detach().abs().max())
        assert ach.score_error is not None
        assert ach.score_error > 0
    assert [ach.slope is None for ach in found] == [False, True, False]  # the second has a batch norm
    assert found[0].slope == float(modules[found[0].name].norm.alpha.detach())

    # The gap from the network's own scores.
    scores: list[Tensor] = []
    first = modules[found[0].name]
    handle = first.scorer.register_forward_hook(lambda _m, _i, out: scores.append(out))
    with torch.no_grad():
        model(inputs)
    handle.remove()
    gaps = []
    for row in scores[0]:
        ordered = sorted(row.tolist(), reverse=True)[: first.cs + 1]
        gaps += [(a - b) / float(row.std()) for a, b in itertools.pairwise(ordered)]
    assert found[0].rank_gap == pytest.approx(sorted(gaps)[(len(gaps) - 1) // 2], rel=1e-3)


def test_static_has_no_scores(make_nano: Callable[..., HadaptiveNet], inputs: Tensor, few_digits: ImageData) -> None:
    _, found, _ = explained("static", make_nano, inputs, few_digits)
    for ach in found:
        assert (ach.selection, ach.rank_gap, ach.score_error, ach.flip_rate) == ("static", None, None, 0)
        assert ach.scale_ratio > 0


def test_margins_of_known_scores() -> None:
    wanted = torch.tensor([[4.0, 1.0, 3.0, 0.0]])  # ranks 4, 3, 1: gaps 1 and 2
    spread = float(wanted.std())
    gap, error = score_margins(wanted, wanted + torch.tensor([0.5, -0.5, 0.5, 0.5]), cs=2)
    assert gap == pytest.approx(1 / spread)
    assert error == pytest.approx(0.5 / spread)
    assert score_margins(wanted, wanted, cs=4)[0] == pytest.approx(1 / spread)  # every channel chosen: gaps 1, 2, 1
