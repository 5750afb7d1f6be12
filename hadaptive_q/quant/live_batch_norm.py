"""BatchNorm that goes on normalising in the fine-tuning, although the deploy form has it folded into the weights.

A folded convolution gets a BatchNorm of its own result, which starts as the identity of the calibration set:
``gamma = sqrt(var + eps)``, ``beta = mean``. It normalises by the batch while training and is folded again after it:
``W' = g W``, ``b' = g (b - mean) + beta`` with ``g = gamma / sqrt(var + eps)``. The codes of a weight with one scale
per output channel, which takes `|g|` in, do not change with `g`: what was trained is what is folded.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from hadaptive_q.quant.fake_quant import PerChannelWeightFakeQuantize
from hadaptive_q.rewrite.graph import aten, calls, constant

PREFIX = "live_batch_norm"


class _LiveBatchNorm(nn.BatchNorm2d):
    """First watches, `watching`, and passes its input on; then a BatchNorm that begins as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.watching = True
        self.register_buffer("count", torch.zeros(()), persistent=False)
        self.register_buffer("moments", torch.zeros(2, channels), persistent=False)

    count: Tensor
    moments: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if not self.watching:
            return super().forward(x)
        self.moments += torch.stack((x.sum((0, 2, 3)), x.square().sum((0, 2, 3))))
        self.count += x.numel() / x.shape[1]
        return x

    def begin(self) -> None:
        mean, square = self.moments / self.count
        assert self.running_mean is not None
        assert self.running_var is not None
        self.running_mean.copy_(mean)
        self.running_var.copy_((square - mean.square()).clamp_min(0))
        self.weight.copy_((self.running_var + self.eps).sqrt())
        self.bias.copy_(mean)
        self.watching = False

    def affine_now(self) -> tuple[Tensor, Tensor]:
        """Return scale and shift of eval mode."""
        assert self.running_mean is not None
        assert self.running_var is not None
        scale = self.weight / (self.running_var + self.eps).sqrt()
        return scale, self.bias - self.running_mean * scale


@torch.no_grad()
def unfold_batch_norm(graph: GraphModule, batches: Iterable[Tensor]) -> int:
    """Give every whole convolution of `graph` a live BatchNorm, identity over `batches`; return how many there are."""
    modules: list[_LiveBatchNorm] = []
    for conv in calls(graph, aten.conv2d.default):
        if constant(graph, conv.args[2] if len(conv.args) > 2 else None) is None or _is_piece(conv):
            continue
        name = f"{PREFIX}_{len(modules)}"
        module = _LiveBatchNorm(int(conv.meta["val"].shape[1]))
        graph.add_module(name, module)
        with graph.graph.inserting_after(conv):
            node = graph.graph.call_module(name, (conv,))
        node.meta = dict(conv.meta)
        conv.replace_all_uses_with(node, delete_user_cb=lambda user, own=node: user is not own)  # type: ignore[misc]
        modules.append(module)
    graph.recompile()
    for inputs in batches:
        graph(inputs)
    for module in modules:
        module.begin()
        module.train()
    return len(modules)


@torch.no_grad()
def refold_batch_norm(graph: GraphModule) -> int:
    """Fold every live BatchNorm into its convolution and return how many there were."""
    modules = dict(graph.named_modules())
    count = 0
    for node in list(graph.graph.nodes):
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(module, _LiveBatchNorm):
            continue
        conv = node.args[0]
        weight, bias = _weight(graph, conv), constant(graph, conv.args[2])
        assert bias is not None
        scale, shift = module.affine_now()
        weight.mul_(scale.reshape(-1, 1, 1, 1))
        quantizer = _quantizer(graph, conv)
        if quantizer is not None:
            quantizer.set_scale(quantizer.scale * scale.abs())
        bias.mul_(scale).add_(shift)
        node.replace_all_uses_with(conv)
        graph.graph.erase_node(node)
        count += 1
    graph.delete_all_unused_submodules()
    graph.recompile()
    return count


def _weight(graph: GraphModule, conv: Node) -> Tensor:
    source = conv.args[1]
    assert isinstance(source, Node)
    value = constant(graph, source.args[0] if source.op == "call_module" else source)
    assert value is not None
    return value


def _quantizer(graph: GraphModule, conv: Node) -> PerChannelWeightFakeQuantize | None:
    source = conv.args[1]
    found = graph.get_submodule(str(source.target)) if isinstance(source, Node) and source.op == "call_module" else None
    return found if isinstance(found, PerChannelWeightFakeQuantize) else None


def _is_piece(conv: Node) -> bool:
    """Whether `conv` is a part of a split convolution: its result is added to another's of the same input."""
    readers = list(conv.users)
    behind = [user for reader in readers for user in (reader.users if reader.op == "call_module" else [reader])]
    return any(_adds_sibling(conv, user) for user in behind)


def _adds_sibling(conv: Node, add: Node) -> bool:
    if add.target != aten.add.Tensor:
        return False
    parts = [part.args[0] if part.op == "call_module" else part for part in add.all_input_nodes]
    return any(p is not conv and p.target == aten.conv2d.default and p.args[0] is conv.args[0] for p in parts)  # type: ignore[union-attr]
