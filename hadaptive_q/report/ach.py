"""ACH in a quantized program: operand scales against the output's, and how near its scores are to a flip."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.fx import GraphModule

from hadaptive_q.models.ach import ACH, DySoft
from hadaptive_q.models.network import Network
from hadaptive_q.quant.program import QuantizedProgram
from hadaptive_q.report.explanation import AchExplanation
from hadaptive_q.report.measure import measure_ach
from hadaptive_q.report.record import AchRecord, LayerRecord
from hadaptive_q.rewrite.graph import aten
from hadaptive_q.rewrite.products import Product, find_products
from hadaptive_q.rewrite.record import record


def explain_ach(
    model: Network,
    deploy: GraphModule,
    program: QuantizedProgram,
    layers: Sequence[LayerRecord],
    inputs: Tensor,
    overlaps: dict[str, float],
) -> list[AchExplanation]:
    """Explain every ACH on `inputs`; `layers` and `overlaps` are the report's."""
    products = {p.name: p for p in find_products(deploy)}
    scales = {layer.name: layer.scale for layer in layers}
    modules = dict(model.ach_modules())
    nodes = {p.name: _scores(deploy, p) for p in products.values() if p.choice}
    reference = record(deploy, inputs, set(nodes.values()))
    measured = record(program.graph, inputs, set(nodes.values()))
    explained = []
    for ach in measure_ach(deploy, program, inputs, overlaps):
        product, module = products[ach.name], modules[ach.name]
        gap = error = None
        if ach.name in nodes:
            name = nodes[ach.name]
            gap, error = score_margins(reference[name], measured[name], module.cs)
        explained.append(_explanation(ach, module, scales[product.mixed], scales[product.normed], gap, error))
    return explained


def _explanation(
    ach: AchRecord, module: ACH, operand: float, output: float, gap: float | None, error: float | None
) -> AchExplanation:
    norm = module.norm
    bias = norm.bias
    assert isinstance(bias, Tensor)
    return AchExplanation(
        **ach.model_dump(),
        operand_scale=operand,
        output_scale=output,
        scale_ratio=operand * operand / output,
        rank_gap=gap,
        score_error=error,
        tau=float(module.scorer.tau),
        slope=float(norm.alpha.detach()) if isinstance(norm, DySoft) else None,
        bias_max=float(bias.detach().abs().max()),
    )


def score_margins(wanted: Tensor, found: Tensor, cs: int) -> tuple[float, float]:
    """Return the median gap of neighbouring ranks and the median error of the scores `(B, C)`.

    Formula, with ``d`` the standard deviation of a sample's scores over its channels and ``xi_(r)`` the score of
    rank r: ``median((xi_(r) - xi_(r+1)) / d)`` for r up to `cs`, and ``median(|found - wanted| / d)``.
    """
    spread = wanted.std(dim=1, keepdim=True)
    top = wanted.topk(min(cs + 1, wanted.shape[1]), dim=1).values
    gaps = (top[:, :-1] - top[:, 1:]) / spread
    return float(gaps.median()), float(((found - wanted).abs() / spread).median())


def _scores(deploy: GraphModule, product: Product) -> str:
    """Return the tensor of scores `(B, C)` behind the choice of `product`: selecting begins by detaching it."""
    (node,) = (n for n in deploy.graph.nodes if n.name == product.choice)
    behind = [node]
    while behind:
        node = behind.pop()
        if node.target == aten.detach.default:
            return str(node.args[0].name)
        behind += node.all_input_nodes
    raise ValueError(f"{product.name}: {product.choice} does not come from scores")
