"""The authors' layout of a CAS-ViT checkpoint: a dict with the tensors under 'model', one head or two.

The shape is read from the tensors; nothing else in the file counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hadaptive_q.errors import UserError

# Theirs to ours, of the parts of a block.
_PARTS = {
    "local_perception.network.0": "local.reduce.conv",
    "local_perception.network.1": "local.reduce.bn",
    "local_perception.network.2": "local.depthwise.conv",
    "local_perception.network.4": "local.expand.conv",
    "norm1": "norm1",
    "attn.qkv": "mixer.qkv",
    **{
        f"attn.oper_{letter}.{theirs}": f"mixer.{name}.{ours}"
        for letter, name in (("q", "query"), ("k", "key"))
        for theirs, ours in (
            ("0.block.0", "0.depthwise.conv"),
            ("0.block.1", "0.depthwise.bn"),
            ("0.block.3", "0.mix"),
            ("1.block.1", "1.mix"),
        )
    },
    "attn.dwc": "mixer.context.conv",
    "attn.proj": "mixer.projection.conv",
    "norm2": "norm2",
    "mlp.fc1": "mlp.expand.conv",
    "mlp.fc2": "mlp.reduce.conv",
}
_ENDS = {
    "patch_embed.0": "stem.0.conv",
    "patch_embed.1": "stem.0.bn",
    "patch_embed.3": "stem.2.conv",
    "patch_embed.4": "stem.2.bn",
    "norm": "head.bn",
    "head": "head.classifier",
    "dist_head": "head.distilled",
}
# Both count from the first stage; behind each but the last comes what halves the size.
_BLOCK = re.compile(r"network\.(\d+)\.(\d+)\.([a-z].*)")
_DOWN = {"proj": "conv", "norm": "bn"}
MOST_BLOCKS = 1000


def fits(content: Mapping[str, Any]) -> bool:
    """Whether `content`, what is in a file, is of this layout."""
    state = content.get("model")
    return isinstance(state, Mapping) and any(str(name).startswith("network.0.0.local_perception.") for name in state)


def read(content: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the fields of the configuration and the renamed tensors. Raises UserError where they make no network."""
    state: Mapping[str, Tensor] = content["model"]
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise UserError(f"{where}, {name}", type(tensor).__name__, "a tensor")
    depths = _depths(state, where)
    starts = [sum(depths[:stage]) + stage for stage in range(len(depths))]
    renamed = {_rename(name, starts, where): tensor for name, tensor in state.items()}
    try:
        fields = {
            "widths": tuple(len(renamed[f"blocks.{start}.norm1.weight"]) for start in starts),
            "depths": depths,
            "ratio": len(renamed["blocks.0.mlp.expand.conv.bias"]) // len(renamed["blocks.0.norm2.weight"]),
            "heads": 1 + ("head.distilled.weight" in renamed),
            "num_classes": len(renamed["head.classifier.bias"]),
        }
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(where, f"no tensor of {error}", "the tensors of a CAS-ViT") from error
    return fields, renamed


def _depths(state: Mapping[str, Tensor], where: str) -> tuple[int, ...]:
    """Return the number of blocks in every stage."""
    found: dict[int, set[int]] = {}
    for name in state:
        if match := _BLOCK.fullmatch(name):
            found.setdefault(int(match[1]), set()).add(int(match[2]))
    stages = sorted(found)
    whole = stages == list(range(0, 2 * len(stages), 2)) and all(
        blocks == set(range(len(blocks))) for blocks in found.values()
    )
    if not whole or sum(map(len, found.values())) > MOST_BLOCKS:
        raise UserError(where, f"blocks in network.{stages}", "stages and blocks without a gap, at network.0, .2, ...")
    return tuple(len(found[stage]) for stage in stages)


def _rename(name: str, starts: list[int], where: str) -> str:
    module, _, leaf = name.rpartition(".")
    if module in _ENDS:
        return f"{_ENDS[module]}.{leaf}"
    if (match := _BLOCK.fullmatch(module)) and match[3] in _PARTS:
        return f"blocks.{starts[int(match[1]) // 2] + int(match[2])}.{_PARTS[match[3]]}.{leaf}"
    parts = module.split(".")
    if len(parts) == 3 and parts[0] == "network" and parts[1].isdecimal() and parts[2] in _DOWN:
        stage = int(parts[1]) // 2 + 1
        if int(parts[1]) % 2 and stage < len(starts):
            return f"blocks.{starts[stage] - 1}.{_DOWN[parts[2]]}.{leaf}"
    raise UserError(f"{where}, {name}", "an unknown tensor", "the tensors of a CAS-ViT")
