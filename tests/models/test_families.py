"""Every family is what the rest of the package takes it for; names and checkpoints find theirs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hadaptive_q.errors import UserError
from hadaptive_q.models.checkpoint import load_model, save_model
from hadaptive_q.models.config import FAMILIES, MODELS
from hadaptive_q.models.families import create_model, find_config, find_family

SMALLEST = [f"{family}_nano" for family in FAMILIES]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_the_variants_that_are_named(family: str) -> None:
    variants = find_family(family).variants
    assert list(variants) == [name for name, of in MODELS.items() if of == family]
    assert all(config.name == name and config.family == family for name, config in variants.items())


@pytest.mark.parametrize("name", MODELS)
def test_every_variant_answers_at_its_smallest_image(name: str) -> None:
    model = create_model(name, 7).eval()
    with torch.no_grad():
        logits = model(torch.randn(2, 3, model.config.stride, model.config.stride))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()
    assert len(model.blocks) > 0


@pytest.mark.parametrize("name", SMALLEST)
def test_a_checkpoint_brings_back_the_network_of_its_family(name: str, tmp_path: Path) -> None:
    model = create_model(name, 5).eval()
    save_model(model, tmp_path / "model.safetensors")
    again = load_model(tmp_path)
    assert type(again) is type(model)
    assert again.config == model.config
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(image), model(image))


def test_a_checkpoint_from_before_there_were_families_is_a_hadaptive_net(tmp_path: Path) -> None:
    save_model(create_model("hadaptive_net_nano"), tmp_path / "model.safetensors")
    beside = tmp_path / "model.json"
    content = json.loads(beside.read_text())
    del content["model"]["family"]
    beside.write_text(json.dumps(content))
    assert load_model(tmp_path).config == find_config("hadaptive_net_nano")


def test_an_unknown_family_is_named(tmp_path: Path) -> None:
    save_model(create_model("hadaptive_net_nano"), tmp_path / "model.safetensors")
    beside = tmp_path / "model.json"
    beside.write_text(beside.read_text().replace('"hadaptive_net"', '"hadaptive_nets"'))
    with pytest.raises(UserError, match=r"model\.family: got 'hadaptive_nets'.*hadaptive_net"):
        load_model(tmp_path)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="hadaptive_net_s"):
        create_model("hadaptive_net_xs")
