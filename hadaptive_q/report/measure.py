"""Measurements for the report: every quantized tensor against float, selection flips, latency, sizes."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from hadaptive_q.lower.file_formats import ModelFile
from hadaptive_q.lower.latency import latencies
from hadaptive_q.lower.parity import sqnr_db
from hadaptive_q.models.ach import ACH
from hadaptive_q.models.config import Preprocess
from hadaptive_q.models.cross_hadamard import cross_hadamard
from hadaptive_q.models.network import Network
from hadaptive_q.quant.program import QuantizedProgram
from hadaptive_q.report.record import AchRecord, Latency, LayerRecord, WeightRecord
from hadaptive_q.rewrite.graph import constant, module_path
from hadaptive_q.rewrite.products import Product, chosen_indices, find_products
from hadaptive_q.rewrite.record import record

OVERLAP_SEED = 0


def measure_layers(deploy: GraphModule, program: QuantizedProgram, inputs: Tensor) -> list[LayerRecord]:
    """Compare every quantized tensor, as its readers see it, with the float deploy graph on the same inputs.

    Once from the image on, and once layer by layer: each gets the quantized inputs and weights it has in `program`.
    """
    readers = _dequantized(program)
    reference = record(deploy, inputs, set(readers))
    recorded = record(program.graph, inputs, {reader.name for reader in readers.values()})
    measured = {name: recorded[reader.name] for name, reader in readers.items()}
    weights = {str(node.args[1]): found for node, _, found in _weights(deploy, program)}
    local = record(deploy, inputs, set(readers), forced=measured | weights)
    origins = {node.name: node for node in deploy.graph.nodes}
    layers = []
    for name, reader in readers.items():
        wanted = reference[name]
        # Below its floor nobody tells a tensor's values apart.
        floor = program.plan.floors.get(name, -math.inf)
        alone = local[name].clamp(min=floor), measured[name].clamp(min=floor)
        layers.append(
            LayerRecord(
                name=name,
                origin=module_path(origins[name]) or "input",
                sqnr_db=sqnr_db(wanted, measured[name]),
                local_sqnr_db=sqnr_db(*alone),
                gain=gain(alone[0].clamp(*_code_ends(reader)), alone[1]),
                low=float(wanted.min()),
                high=float(wanted.max()),
                scale=float(reader.args[1]),  # type: ignore[arg-type]
            )
        )
    return layers


def measure_weights(deploy: GraphModule, program: QuantizedProgram) -> list[WeightRecord]:
    """Compare the weights of every quantized layer with those of the float deploy graph."""
    return [
        WeightRecord(
            layer=module_path(node),
            name=node.name,
            sqnr_db=sqnr_db(wanted, found),
            gain=gain(wanted.reshape(-1, 1), found.reshape(-1, 1)),
        )
        for node, wanted, found in _weights(deploy, program)
    ]


def _weights(deploy: GraphModule, program: QuantizedProgram) -> Iterator[tuple[Node, Tensor, Tensor]]:
    """Yield every quantized layer of `deploy`, its weights in float, and what its codes in `program` stand for."""
    layers = {node.name: node for node in program.graph.graph.nodes}
    for node in deploy.graph.nodes:
        if node.name in program.plan.weights:
            wanted, weight = constant(deploy, node.args[1]), layers[node.name].args[1]
            found = constant(program.graph, weight)
            if found is None:
                codes, scales = (constant(program.graph, argument) for argument in weight.args[:2])
                assert codes is not None
                assert scales is not None
                found = codes * scales.reshape(-1, *[1] * (codes.dim() - 1))
            assert wanted is not None
            yield node, wanted.detach(), found.detach().float()


def _code_ends(reader: Node) -> tuple[float, float]:
    """Return the values of the lowest and the highest code that the dequantize `reader` reads."""
    _, scale, zero_point, low, high, *_ = reader.args
    return scale * (low - zero_point), scale * (high - zero_point)  # type: ignore[operator, return-value]


def gain(signal: Tensor, noisy: Tensor) -> float:
    """Return the least-squares slope of `noisy` on `signal` `(B, C, ...)`, with an intercept per channel.

    ``sum (x - x_c) (y - y_c) / sum (x - x_c)^2``; 1 where no channel of `signal` varies.
    """
    others = [d for d in range(signal.dim()) if d != 1]
    x, y = (tensor.double() - tensor.double().mean(others, keepdim=True) for tensor in (signal, noisy))
    power = float(x.square().sum())
    return float((x * y).sum()) / power if power else 1.0


def _dequantized(program: QuantizedProgram) -> dict[str, Node]:
    """Map each quantized tensor to one of the dequantize operators that read its codes."""
    found: dict[str, Node] = {}
    for node in program.graph.graph.nodes:
        if "dequantize_per_tensor" in str(node.target):
            codes = node.args[0]
            source = codes.args[0]
            if source.name in program.plan.activations:
                found.setdefault(source.name, node)
    return found


def measure_ach(
    deploy: GraphModule, program: QuantizedProgram, inputs: Tensor, overlaps: dict[str, float]
) -> list[AchRecord]:
    """Compare operands, products, norms and selections of every ACH with float on the same inputs."""
    products = find_products(deploy)
    readers = _dequantized(program)
    names = {n for p in products for n in (p.mixed, p.chosen, p.normed, p.choice) if n}
    reference = record(deploy, inputs, names)
    measured = record(program.graph, inputs, names | {readers[p.normed].name for p in products})
    return [_ach_record(p, reference, measured, readers[p.normed].name, overlaps.get(p.name)) for p in products]


def _ach_record(
    p: Product, reference: dict[str, Tensor], measured: dict[str, Tensor], normed: str, overlap: float | None
) -> AchRecord:
    set_flips = rank_flips = 0.0
    if p.choice:
        wanted, found = (chosen_indices(values[p.choice]) for values in (reference, measured))
        set_flips, rank_flips = flip_rates(wanted, found)
    products = [cross_hadamard(values[p.chosen]) for values in (reference, measured)]
    return AchRecord(
        name=p.name,
        selection="dynamic" if p.choice else "static",
        flip_rate=set_flips,
        rank_flip_rate=rank_flips,
        train_eval_overlap=overlap,
        operand_sqnr_db=sqnr_db(reference[p.chosen], measured[p.chosen]),
        product_sqnr_db=sqnr_db(*products),
        output_sqnr_db=sqnr_db(reference[p.normed], measured[normed]),
        mixed_max=float(reference[p.mixed].abs().max()),
        product_max=float(products[0].abs().max()),
        normed_max=float(reference[p.normed].abs().max()),
    )


def flip_rates(wanted: Tensor, found: Tensor) -> tuple[float, float]:
    """Return the shares of set flips and rank flips between two selections `(B, Cs)`."""
    kept = (found[:, :, None] == wanted[:, None, :]).any(dim=2)
    return 1 - float(kept.double().mean()), float((found != wanted).double().mean())


@torch.no_grad()
def train_eval_overlap(model: Network, inputs: Tensor) -> dict[str, float]:
    """Return, by ACH, the share of channels that published training (Gumbel noise 1) and inference both choose."""
    overlaps: dict[str, float] = {}

    def hook(name: str, module: ACH) -> Callable[[object, object, Tensor], None]:
        def compare(_module: object, _inputs: object, scores: Tensor) -> None:
            generator = torch.Generator().manual_seed(OVERLAP_SEED)
            noise = -torch.empty_like(scores).exponential_(generator=generator).log()
            overlaps[name] = 1 - flip_rates(module.select(scores), module.select(scores + noise))[0]

        return compare

    handles = [module.scorer.register_forward_hook(hook(name, module)) for name, module in model.ach_modules()]
    model.eval()(inputs)
    for handle in handles:
        handle.remove()
    return overlaps


def measure_latency(quantized: ModelFile, reference: ModelFile, image: Tensor, preprocess: Preprocess) -> Latency:
    """Time both files side by side on one uint8 image `(1, 3, S, S)`."""
    files = [quantized, reference]
    (median, spread), (float_median, float_spread) = latencies(files, [f.input.of(image, preprocess) for f in files])
    return Latency(
        host_ms_median=median,
        host_ms_spread=spread,
        float_host_ms_median=float_median,
        float_host_ms_spread=float_spread,
    )


def deflated_bytes(data: bytes) -> int:
    """Return the size of `data` in a zip file, raw deflate at the highest level."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    return len(compressor.compress(data)) + len(compressor.flush())
