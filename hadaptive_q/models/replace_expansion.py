"""ACH in the place of the pointwise expansion of inverted bottlenecks, in networks of any origin.

Source: arXiv 2505.22226v2, where ACH replaces the expansion of MobileNets as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

from hadaptive_q.errors import UserError, nearest
from hadaptive_q.models.ach import ACH
from hadaptive_q.models.config import Norm, SlotOrder
from hadaptive_q.models.network import Network

Model = TypeVar("Model", bound=nn.Module)


def replace_expansion(
    model: Model,
    blocks: Sequence[str],
    cs: int | None = None,
    norm: Norm = "dysoft",
    slot_order: SlotOrder = "channel",
) -> Model:
    """Put ACH into the inverted bottlenecks of `model` that have the names `blocks`, in place, and return `model`.

    A block's first pointwise convolution that widens, `c1` to `e` channels, becomes ACH with `cs` chosen channels,
    ``c1 + cs (cs - 1) / 2`` channels wide; the norm and activation behind it go, as ACH has a norm of its own. What the
    block computes on `e` channels, up to its projection, is made anew in the new width; all other weights stay.
    Unless given, `cs` is for each block the one whose width is nearest to `e`.
    Raises UserError for a name that is no module, a block without such a convolution, or a `cs` beyond [2, c1].
    """
    modules = dict(model.named_modules())
    chosen = {}
    for name in blocks:
        if name not in modules:
            raise UserError(
                f"blocks, {name}", "the name of no module", "an inverted bottleneck", nearest(name, modules)
            )
        _, conv = _find_expansion(modules[name], name)
        chosen[name] = cs or nearest_cs(conv.in_channels, conv.out_channels)
        if not 2 <= chosen[name] <= conv.in_channels:
            raise UserError(
                f"cs of {name}", str(chosen[name]), f"2 to {conv.in_channels}, the channels it chooses from"
            )
    if isinstance(model, Network):
        model.config = model.config.with_ach(chosen, norm, slot_order)
    put_ach(model, chosen, norm, slot_order)
    return model


def put_ach(model: nn.Module, cs: Mapping[str, int], norm: Norm, slot_order: SlotOrder) -> None:
    """Put ACH into the blocks of `model` that `cs` names, with so many chosen channels each."""
    for name, count in cs.items():
        block = model.get_submodule(name)
        path, conv = _find_expansion(block, name)
        _replace(block, path, conv, ACH(conv.in_channels, count, norm, slot_order))


def nearest_cs(channels: int, width: int) -> int:
    """Return the number of channels of `channels` to choose for which ACH is nearest to `width` channels wide."""
    return min(range(2, channels + 1), key=lambda cs: abs(channels + cs * (cs - 1) // 2 - width))


def _find_expansion(block: nn.Module, name: str) -> tuple[str, nn.Conv2d]:
    for path, layer in block.named_modules():
        if isinstance(layer, nn.Conv2d) and _is_pointwise(layer) and layer.out_channels > layer.in_channels >= 2:
            return path, layer
    raise UserError(f"blocks, {name}", "no pointwise convolution that widens", "an inverted bottleneck")


def _is_pointwise(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.groups == 1


def _replace(block: nn.Module, path: str, expansion: nn.Conv2d, ach: ACH) -> None:
    """Put `ach` into `block` where `path` has `expansion`, without what acts on that alone; resize what follows."""
    old, new = expansion.out_channels, ach.out_channels
    parent = block.get_submodule(path.rpartition(".")[0])
    siblings = list(parent.named_children())
    start = [child for _, child in siblings].index(expansion)
    for name, child in siblings[start + 1 :]:
        if any(isinstance(layer, nn.Conv2d) for layer in child.modules()):
            break
        setattr(parent, name, nn.Identity())
    setattr(parent, path.rpartition(".")[2], ach.to(expansion.weight.device))
    inside = set(ach.modules())
    following = [layer for layer in block.modules() if layer not in inside]
    # A gate narrows before it widens again: only the last of them leaves the width.
    narrowing = [c for c in following if isinstance(c, nn.Conv2d) and _is_pointwise(c) and c.in_channels == old]
    for layer in following:
        if isinstance(layer, nn.Conv2d):
            _resize_convolution(layer, old, new, leaves=layer is narrowing[-1])
        elif isinstance(layer, nn.BatchNorm2d) and layer.num_features == old:
            _resize_norm(layer, new)
        if narrowing and layer is narrowing[-1]:
            break


def _resize_convolution(conv: nn.Conv2d, old: int, new: int, leaves: bool) -> None:
    before = (conv.in_channels, conv.out_channels)
    if conv.groups == old:
        conv.groups = new
    if conv.in_channels == old:
        conv.in_channels = new
    if conv.out_channels == old and not leaves:
        conv.out_channels = new
    if before != (conv.in_channels, conv.out_channels):
        shape = (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size)
        conv.weight = nn.Parameter(conv.weight.new_empty(shape))
        if conv.bias is not None:
            conv.bias = nn.Parameter(conv.bias.new_empty(conv.out_channels))
        conv.reset_parameters()


def _resize_norm(norm: nn.BatchNorm2d, channels: int) -> None:
    norm.num_features = channels
    like = norm.running_mean if norm.running_mean is not None else torch.empty(0)
    if norm.affine:
        norm.weight, norm.bias = (nn.Parameter(like.new_empty(channels)) for _ in range(2))
    if norm.track_running_stats:
        norm.running_mean, norm.running_var = like.new_empty(channels), like.new_empty(channels)
    norm.reset_parameters()
