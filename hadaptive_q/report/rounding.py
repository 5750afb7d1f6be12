"""How every tensor of a calibrated graph is stored and how far it moves, and what is not stored in codes at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

from hadaptive_q.lower.parity import sqnr_db
from hadaptive_q.quant.plan import Plan, stored
from hadaptive_q.quant.sites import Site, bits_of
from hadaptive_q.report.explanation import Blame, FloatIsland, RoundedTensor
from hadaptive_q.report.record import LayerRecord
from hadaptive_q.rewrite.graph import aten, constant, module_path

# They move values and change none.
_MOVES = {
    *(aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.expand.default, aten.unsqueeze.default),
    *(aten.permute.default, aten.slice.Tensor, aten.cat.default, aten.index.Tensor, aten.gather.default),
    *(aten.detach.default, aten.dropout.default),
}


@torch.no_grad()
def measure_rounding(
    graph: GraphModule, sites: Sequence[Site], layers: Sequence[LayerRecord], inputs: Tensor, blames: Sequence[Blame]
) -> list[RoundedTensor]:
    """Describe `sites` of the calibrated `graph`; `layers` holds what the report says of its activations."""
    shares = _clipped_shares(graph, sites, inputs)
    records = {layer.name: layer for layer in layers}
    described = []
    for site, clipped, blame in zip(sites, shares, blames, strict=True):
        weight = constant(graph, site.places[0].args[0])
        described.append(
            _activation(site, clipped, blame, records) if weight is None else _weight(site, clipped, blame, weight)
        )
    return described


def _clipped_shares(graph: GraphModule, sites: Sequence[Site], inputs: Tensor) -> list[float]:
    """Run the quantized network and return the share of values beyond the codes at each of `sites`."""
    values, clipped = [0] * len(sites), [0] * len(sites)

    def watch(index: int) -> Callable[[object, tuple[Tensor, ...]], None]:
        def count(_module: object, given: tuple[Tensor, ...]) -> None:
            values[index] += given[0].numel()
            clipped[index] += int(sites[index].clipped(given[0]).sum())

        return count

    handles = [site.quantizer.register_forward_pre_hook(watch(index)) for index, site in enumerate(sites)]
    graph(inputs)
    for handle in handles:
        handle.remove()
    return [count / total for count, total in zip(clipped, values, strict=True)]


def _activation(site: Site, clipped: float, blame: Blame, records: dict[str, LayerRecord]) -> RoundedTensor:
    # The last one holds all values of those that share a scale; what no operator reads in codes has no record.
    layer = next(records[name] for name in reversed(site.tensors) if name in records)
    return RoundedTensor(
        layer=site.layer,
        name=layer.name,
        kind=site.kind,
        tensors=list(site.tensors),
        format=f"int{bits_of(site.quantizer)}",
        granularity="per tensor",
        low=layer.low,
        high=layer.high,
        scale=layer.scale,
        smallest_scale=layer.scale,
        zero_point=int(site.quantizer.calculate_qparams()[1]),
        clipped=clipped,
        sqnr_db=layer.sqnr_db,
        blame=blame,
    )


def _weight(site: Site, clipped: float, blame: Blame, weight: Tensor) -> RoundedTensor:
    scales, zero_points = site.quantizer.calculate_qparams()
    return RoundedTensor(
        layer=site.layer,
        name=site.tensors[0],
        kind=site.kind,
        tensors=list(site.tensors),
        format=f"int{bits_of(site.quantizer)}",
        granularity="per channel",
        low=float(weight.min()),
        high=float(weight.max()),
        scale=float(scales.max()),
        smallest_scale=float(scales.min()),
        zero_point=int(zero_points[0]),
        clipped=clipped,
        sqnr_db=sqnr_db(weight, site.quantizer(weight)),
        blame=blame,
    )


def float_islands(deploy: GraphModule, plan: Plan) -> list[FloatIsland]:
    """Return what the deploy graph computes on floats under `plan`, by layer, in the order of the data."""
    islands: dict[str, Counter[str]] = {}
    for node in deploy.graph.nodes:
        if node.op == "call_function" and node.target not in _MOVES and stored(node).name not in plan.activations:
            operator = node.target.overloadpacket.__name__
            islands.setdefault(module_path(node) or "input", Counter())[operator] += 1
    return [FloatIsland(layer=layer, operators=dict(counts)) for layer, counts in islands.items()]
