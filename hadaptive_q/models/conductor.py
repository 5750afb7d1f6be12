"""The authors' layout of a Hadaptive-Net checkpoint: `model_desc` gives the shape, `model_state_dict` the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from hadaptive_q.errors import UserError, first_line
from hadaptive_q.models.config import ACHConfig, BlockConfig, ConvConfig, GhostConfig, HadaptiveNetConfig, Norm
from hadaptive_q.models.cross_hadamard import pair_indices

_NORMS: dict[str, Norm] = {"DySoft": "dysoft", "BN": "batch_norm", "BatchNorm2d": "batch_norm"}
MOST_PARTS = 1000
_CONV_BN = {"conv": "conv", "bn": "bn"}
_GHOST = {"primary_conv": "primary", "cheap_operation": "cheap"}
_ACH = {"fc": "pointwise", "norm_x": "bn", "eva_net.conv": "scorer", "norm": "norm"}


def fits(content: Mapping[str, Any]) -> bool:
    """Whether `content`, what is in a file, is of this layout."""
    return all(isinstance(content.get(key), Mapping) for key in ("model_desc", "model_state_dict"))


def read(content: Mapping[str, Any], where: str) -> tuple[HadaptiveNetConfig, dict[str, Tensor]]:
    """Return the configuration and the renamed tensors. Raises UserError where they make no Hadaptive-Net."""
    try:
        config = parse_description(content["model_desc"])
    except (ValidationError, KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f"{where}, model_desc", f"'{first_line(error)}'", "the description of a Hadaptive-Net"
        ) from error
    return config, _rename(config, content["model_state_dict"], where)


def parse_description(description: Mapping[str, Any]) -> HadaptiveNetConfig:
    """Turn the authors' `model_desc` (rows of ``[from, repeats, kind, arguments]``) into our configuration."""
    if sum(max(0, repeats) for _, repeats, _, _ in description["backbone"]) > MOST_PARTS:
        raise ValueError(f"more than {MOST_PARTS} parts")
    parts = [(kind, args) for _, repeats, kind, args in description["backbone"] for _ in range(repeats)]
    blocks = [_block(args) for kind, args in parts if kind == "AdaptiveBottleneck"]
    convs = [_conv(args) for kind, args in parts if kind == "ConvNormAct"]
    kinds = [kind for kind, _ in parts]
    expected = ["ConvNormAct"] * (len(convs) - 1) + ["AdaptiveBottleneck"] * len(blocks) + ["ConvNormAct"]
    if kinds != expected:
        raise ValueError("rows other than stem, bottlenecks and one tail convolution")
    _, _, head, arguments = description["head"][0]
    if head != "Classifier":
        raise ValueError(f"unknown head {head!r}")
    hidden, dropout = (*arguments, *(None, 1280, 0.3)[len(arguments) :])[1:3]
    return HadaptiveNetConfig(
        name="conductor",
        num_classes=description["nc"],
        stem=tuple(convs[:-1]),
        blocks=tuple(blocks),
        tail=convs[-1].channels,
        hidden=hidden,
        dropout=dropout,
    )


def _conv(arguments: list[Any]) -> ConvConfig:
    (channels, k, s), norm, act = arguments
    if norm != "BatchNorm2d" or act not in (None, "Hardswish"):
        raise ValueError(f"unknown norm or activation in {arguments}")
    return ConvConfig(channels=channels, k=k, s=s, act=act is not None)


def _block(arguments: list[Any]) -> BlockConfig:
    channels, kind, amount, k, s, *norm = arguments
    if kind == "Ghost":
        return GhostConfig(channels=channels, ratio=amount, k=k, s=s)
    if kind != "Hada":
        raise ValueError(f"unknown expansion {kind!r}")
    name = norm[0] if norm else "DySoft"
    if name not in _NORMS:
        raise ValueError(f"product norm {name!r}, known are {', '.join(_NORMS)}")
    return ACHConfig(channels=channels, cs=amount, k=k, s=s, norm=_NORMS[name])


def _prefixes(config: HadaptiveNetConfig) -> dict[str, str]:
    """Map the authors' module names to ours."""
    renamed: dict[str, str] = {}

    def conv_bn(theirs: str, ours: str) -> None:
        renamed.update({f"{theirs}.{a}": f"{ours}.{b}" for a, b in _CONV_BN.items()})

    for index in range(len(config.stem)):
        conv_bn(f"layers.{index}", f"stem.{index}")
    offset = len(config.stem)
    for index, block in enumerate(config.blocks):
        theirs, ours = f"layers.{offset + index}.block", f"blocks.{index}"
        if isinstance(block, ACHConfig):
            renamed.update({f"{theirs}.0.{a}": f"{ours}.expansion.{b}" for a, b in _ACH.items()})
            renamed[f"{theirs}.0"] = f"{ours}.expansion.scorer"  # holds tau
        else:
            for a, b in _GHOST.items():
                conv_bn(f"{theirs}.0.{a}", f"{ours}.expansion.{b}")
        conv_bn(f"{theirs}.1", f"{ours}.depthwise")
        conv_bn(f"{theirs}.2", f"{ours}.projection")
    offset += len(config.blocks)
    conv_bn(f"layers.{offset}", "tail")
    renamed[f"layers.{offset + 1}.classifier.0"] = "head.hidden"
    renamed[f"layers.{offset + 1}.classifier.3"] = "head.classifier"
    return renamed


def _rename(config: HadaptiveNetConfig, state: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    prefixes = _prefixes(config)
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise UserError(f"{where}, {name}", type(tensor).__name__, "a tensor")
        module, _, leaf = str(name).rpartition(".")
        if module not in prefixes:
            raise UserError(f"{where}, {name}", "an unknown tensor", "the tensors of the described network")
        if leaf in ("hadamard_i", "hadamard_j") and prefixes[module].endswith(".scorer"):
            _check_pairs(config, name, tensor, where)
        elif leaf != "tau_adj":
            tensors[f"{prefixes[module]}.{leaf}"] = tensor
    for index, block in enumerate(config.blocks):
        if isinstance(block, ACHConfig):  # steps of the temperature rule that the authors do not store
            for leaf in ("gradient_norm", "stored_norm"):
                tensors[f"blocks.{index}.expansion.scorer.{leaf}"] = torch.tensor(float("nan"))
    return tensors


def _check_pairs(config: HadaptiveNetConfig, name: str, tensor: Tensor, where: str) -> None:
    """Refuse a file whose product slots are not in row-major order: its norms would meet other products."""
    block = config.blocks[int(name.split(".")[1]) - len(config.stem)]
    assert isinstance(block, ACHConfig)
    expected = pair_indices(block.cs)[name.endswith("j")]
    if not torch.equal(tensor.long(), expected):
        raise UserError(f"{where}, {name}", "another pair order", f"the row-major pairs of {block.cs} channels")
