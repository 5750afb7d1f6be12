"""Ranges that are chosen together because what is read is a product: of an ACH's channels, or of two tensors.

Of an element-wise product ``p = a b``, ``J = E |Q_p(Q_a(a) Q_b(b)) - a b|^2 / E |a b|^2`` is least in all three ranges,
plus ``E |Q_a(a) - a|^2 / E |a|^2`` for an operand that has other readers. An operand's error counts by how large the
other one is where it occurs: clipping a tail that meets small factors costs little, one code near zero that meets large
ones much. A gate `(B, C, 1, 1)` meets every pixel of its channel. The first term is taken over the pairs with the
largest products, which are few and decide where to clip, and over a sample of all others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from hadaptive_q.quant.fake_quant import ActivationFakeQuantize
from hadaptive_q.quant.observers import Range, Weighted, quantize, search_range
from hadaptive_q.quant.product import ALTERNATIONS, Objective, PixelSampler, find_ranges, relative_error
from hadaptive_q.quant.sites import quantizer_of
from hadaptive_q.rewrite.fold_dysoft import stored_range
from hadaptive_q.rewrite.graph import aten, calls
from hadaptive_q.rewrite.products import Product, norm_of_products

PAIRS, LARGEST = 1 << 16, 1 << 13


class JointRanges(Protocol):
    """Some ranges of a prepared graph, from the watching to the choice."""

    names: set[str]

    def watch(self, values: dict[str, Tensor]) -> None:
        """Take the tensors `names` of one batch into account."""

    def chooser(self) -> Callable[[], None]:
        """Return what sets the ranges, once each is what it is by itself; observers still know their values now."""


class CrossProduct:
    """X~ of an ACH and its normed products."""

    def __init__(self, graph: GraphModule, product: Product) -> None:
        self.graph, self.product, self.sampler = graph, product, PixelSampler()
        self.names = {product.chosen}

    def watch(self, values: dict[str, Tensor]) -> None:
        self.sampler.add(values[self.product.chosen])

    def chooser(self) -> Callable[[], None]:
        mixed, normed = (quantizer_of(self.graph, name) for name in (self.product.mixed, self.product.normed))
        norm = norm_of_products(self.graph, self.product)
        objective = Objective(mixed.observer.values(), self.sampler.chosen(), norm, mixed.observer.levels)

        def choose() -> None:
            limits = mixed.observer.limits(), self._normed_limits(normed)
            found = find_ranges(objective, limits, ((mixed.low, mixed.high), (normed.low, normed.high)))
            for quantizer, ends in zip((mixed, normed), found, strict=True):
                quantizer.set_range(*ends)

        return choose

    def _normed_limits(self, quantizer: ActivationFakeQuantize) -> Range:
        """Return a DySoft's own bounds, which no image can leave; another norm's output is as large as it was seen."""
        (node,) = (node for node in self.graph.graph.nodes if node.name == self.product.normed)
        bounds = stored_range(self.graph, node)
        if bounds is None:
            return quantizer.observer.limits()
        return quantizer.low.new_tensor(min(bounds[0], 0.0)), quantizer.low.new_tensor(max(bounds[1], 0.0))


class Multiplication:
    """Both operands and the result of an element-wise product of tensors that are stored in codes."""

    def __init__(self, quantizers: Sequence[ActivationFakeQuantize], operands: Sequence[str], apart: Sequence[bool]):
        """`operands` are names of nodes, `apart` says of each whether anything else reads its codes."""
        self.quantizers, self.operands, self.apart = quantizers, operands, apart
        self.sampler, self.seen, self.largest = PixelSampler(PAIRS), 0, torch.empty(0, 2)
        self.names = set(operands)

    def watch(self, values: dict[str, Tensor]) -> None:
        pair = torch.broadcast_tensors(*(values[name] for name in self.operands))
        # Every pair is a pixel of two channels.
        pixels = torch.stack(pair, dim=1).flatten(2)[..., None]
        self.sampler.add(pixels)
        self.seen += pair[0].numel()
        known = torch.cat((self.largest, pixels.transpose(1, 2).reshape(-1, 2)))
        self.largest = known[known.prod(dim=1).abs().topk(min(LARGEST, len(known))).indices]

    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return operands `a` and `b` `(N,)`, and for how many pairs each stands."""
        drawn = self.sampler.chosen()[0, :, 0].T
        others = drawn[drawn.prod(dim=1).abs() < self.largest.prod(dim=1).abs().min()]
        share = (self.seen - len(self.largest)) / max(1, len(others))
        counts = torch.cat((torch.ones(len(self.largest)), torch.full((len(others),), share)))
        a, b = torch.cat((self.largest, others)).T
        return a, b, counts

    def chooser(self) -> Callable[[], None]:
        alone = [q.observer.values() if apart else None for q, apart in zip(self.quantizers, self.apart, strict=False)]

        def choose() -> None:
            limits = [q.observer.limits() for q in self.quantizers]
            # Not from the range that each has by itself: where all three clip, none alone gains by clipping less.
            found, pairs = list(limits), self.pairs()
            for _ in range(ALTERNATIONS):
                for place, quantizer in enumerate(self.quantizers):
                    if not quantizer.known:
                        found[place] = search_range(
                            self._error(pairs, found, place, alone), limits[place], found[place]
                        )
            for quantizer, ends in zip(self.quantizers, found, strict=True):
                quantizer.set_range(*ends)

        return choose

    def _error(
        self,
        pairs: tuple[Tensor, Tensor, Tensor],
        ranges: Sequence[Range],
        place: int,
        alone: Sequence[Weighted | None],
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Return J as a function of the range at `place`, the others being `ranges`."""
        a, b, counts = pairs
        # As weights of the squares of a relative error.
        weights, levels = counts.sqrt(), [q.observer.levels for q in self.quantizers]
        wanted = a * b * weights

        def error(low: Tensor, high: Tensor) -> Tensor:
            tried = list(ranges)
            tried[place] = low, high
            first, second, result = tried
            product = quantize(a, *first, levels[0]) * quantize(b, *second, levels[1])
            total = relative_error(wanted, quantize(product, *result, levels[2]) * weights)
            for values, ends, count in zip(alone, (first, second), levels, strict=False):
                if values is not None:
                    total = total + values.error(*ends, count) / values.power()
            return total

        return error


def find_multiplications(graph: GraphModule) -> list[Multiplication]:
    """Return the element-wise products of the prepared `graph` whose operands and result have a range of their own."""
    found = []
    for node in calls(graph, aten.mul.Tensor):
        operands = node.all_input_nodes
        quantizers = [_quantizer(graph, place) for place in (*operands, *node.users)]
        kept = [quantizer for quantizer in quantizers if quantizer is not None]
        if len(operands) == 2 and len(node.users) == 1 and len(set(kept)) == len(quantizers) == 3:
            apart = [_readers(graph, quantizer) != {node} for quantizer in kept[:2]]
            found.append(Multiplication(kept, [operand.name for operand in operands], apart))
    return found


def _quantizer(graph: GraphModule, node: Node) -> ActivationFakeQuantize | None:
    found = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    return found if isinstance(found, ActivationFakeQuantize) else None


def _readers(graph: GraphModule, quantizer: ActivationFakeQuantize) -> set[Node]:
    """Return what reads the codes of any tensor that `quantizer` stores."""
    return {user for node in graph.graph.nodes if _quantizer(graph, node) is quantizer for user in node.users}
