"""The authors' CAS-ViT files load with one head or two, whatever else is in them, or are refused in one line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hadaptive_q.errors import UserError
from hadaptive_q.models.checkpoint import load_model
from hadaptive_q.models.families import create_model

KEYS = Path(__file__).parent.parent / "golden" / "rcvit_xs_keys.txt"


def state(two_heads: bool) -> dict[str, Tensor]:
    """Return the tensors of an authors' xs by the list of their names and shapes."""
    tensors = {}
    for line in KEYS.read_text().splitlines():
        name, shape, kind = line.split("\t")
        size = [int(number) for number in shape.strip("[]").split(",") if number]
        if two_heads or not name.startswith("dist_head"):
            tensors[name] = torch.zeros(size, dtype=getattr(torch, kind))
    return tensors


def write(content: object, folder: Path) -> Path:
    path = folder / "checkpoint.pth"
    torch.save(content, path)
    return path


@pytest.mark.parametrize("heads", [1, 2])
def test_every_tensor_of_xs_has_its_place(heads: int, tmp_path: Path) -> None:
    tensors = state(heads == 2)
    assert len(tensors) == (522 if heads == 1 else 524)
    beside = {"model_ema": tensors, "epoch": 3, "args": argparse.Namespace(lr=6e-3, model="rcvit_xs")}
    model = load_model(write({"model": tensors, **beside}, tmp_path))
    assert model.config == create_model("rcvit_xs", 1000, heads=heads).config
    assert len(model.state_dict()) == len(tensors)


def test_weights_arrive_where_they_belong(tmp_path: Path) -> None:
    tensors = state(True)
    marks = {
        "network.0.1.attn.oper_k.1.block.1.weight": "blocks.1.mixer.key.1.mix.weight",
        "network.3.proj.bias": "blocks.5.conv.bias",
        "network.4.3.mlp.fc2.bias": "blocks.9.mlp.reduce.conv.bias",
        "network.6.0.local_perception.network.1.running_mean": "blocks.11.local.reduce.bn.running_mean",
        "dist_head.bias": "head.distilled.bias",
    }
    for number, name in enumerate(marks, 1):
        tensors[name].fill_(number)
    found = load_model(write({"model": tensors}, tmp_path)).state_dict()
    assert [found[name].unique().item() for name in marks.values()] == [1, 2, 3, 4, 5]


def _without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if not key.startswith(name)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: _without(s, "network.4.1."), r"got blocks in network\.\[0, 2, 4, 6\].*without a gap"),
        (lambda s: _without(s, "network.4."), r"got blocks in network\.\[0, 2, 6\].*without a gap"),
        (lambda s: _without(s, "head."), r"got no tensor of 'head\.classifier\.bias'"),
        (lambda s: _without(s, "network.2.0.mlp.fc1"), r"got 2 tensors missing.*the tensors of rcvit_xs"),
        (lambda s: s | {"network.7.proj.bias": torch.zeros(1)}, r"network\.7\.proj\.bias: got an unknown tensor"),
        (lambda s: s | {"aux.weight": torch.zeros(1)}, r"aux\.weight: got an unknown tensor"),
        (lambda s: s | {"norm.weight": "one"}, r"norm\.weight: got str; expected a tensor"),
        (lambda s: s | {"head.bias": torch.tensor(1.0)}, r"got no tensor of"),
    ],
)
def test_what_makes_no_network_is_refused_in_a_line(change: Any, message: str, tmp_path: Path) -> None:
    path = write({"model": change(state(True))}, tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_foreign_layout_names_those_that_are_known(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'model_desc' and 'model_state_dict' or a dict with 'model'"):
        load_model(write({"weights": {}}, tmp_path))
