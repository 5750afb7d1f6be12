"""Weights survive writing and reading; whatever else lies in their place is answered with one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hadaptive_q.errors import UserError
from hadaptive_q.models.checkpoint import load_model, read_training_key, save_model
from hadaptive_q.models.config import Preprocess
from hadaptive_q.models.families import create_model
from hadaptive_q.models.hadaptive_net import HadaptiveNet

PREPROCESS = Preprocess(image_size=32, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), classes=("ä", "b c", "/"))


@pytest.fixture
def saved(nano: HadaptiveNet, tmp_path: Path) -> Path:
    save_model(nano, tmp_path / "model.safetensors", "what it was trained from")
    return tmp_path / "model.safetensors"


def change_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def change_config(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    config = json.loads(path.with_suffix(".json").read_text())
    change(config)
    path.with_suffix(".json").write_text(json.dumps(config))


def test_a_saved_model_comes_back(nano: HadaptiveNet, inputs: Tensor, tmp_path: Path) -> None:
    nano.preprocess = PREPROCESS
    path = tmp_path / "a b" / "mödel.safetensors"
    path.parent.mkdir()
    save_model(nano, path)
    assert {p.name for p in path.parent.iterdir()} == {"mödel.safetensors", "mödel.json"}

    loaded = load_model(path)
    assert (loaded.config, loaded.preprocess) == (nano.config, PREPROCESS)
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(inputs), nano(inputs))


def test_a_folder_stands_for_its_model(saved: Path, nano: HadaptiveNet, inputs: Tensor) -> None:
    with torch.no_grad():
        assert torch.equal(load_model(saved.parent)(inputs), nano(inputs))
        assert torch.equal(load_model(str(saved.parent))(inputs), nano(inputs))


def test_a_model_under_training_is_saved_as_it_is(nano: HadaptiveNet, tmp_path: Path) -> None:
    nano.train()(torch.randn(4, 3, 32, 32)).sum().backward()
    for _, ach in nano.ach_modules():
        ach.scorer.step_temperature()
    save_model(nano, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path)
    scorer, wanted = (dict(model.ach_modules())["blocks.2.expansion"].scorer for model in (loaded, nano))
    assert torch.equal(scorer.gradient_norm, wanted.gradient_norm)
    assert scorer.gradient_norm > 0
    assert not scorer.gradient_norm.requires_grad


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(half: torch.dtype, saved: Path, nano: HadaptiveNet) -> None:
    original = load_file(saved)
    save_file({n: t.to(half) if t.is_floating_point() else t for n, t in original.items()}, saved)
    loaded = load_model(saved)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert loaded.blocks[0].projection.bn.num_batches_tracked.dtype == torch.int64
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter.detach(), original[name].to(half).float()), name


def test_training_key_tells_where_weights_come_from(saved: Path, nano: HadaptiveNet) -> None:
    assert read_training_key(saved) == "what it was trained from"
    save_model(nano, saved)
    assert read_training_key(saved) is None
    saved.with_suffix(".json").unlink()
    assert read_training_key(saved) is None
    saved.unlink()
    assert read_training_key(saved) is None


def test_a_configuration_never_stands_beside_weights_of_another_run(
    saved: Path, nano: HadaptiveNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("hadaptive_q.models.checkpoint.write_bytes", no_space)
    with torch.no_grad():
        nano.head.hidden.bias[0] += 1
    with pytest.raises(OSError, match="no space"):
        save_model(nano, saved, "another run")
    assert read_training_key(saved) is None


def test_weights_that_are_there_already_keep_their_configuration(
    saved: Path, nano: HadaptiveNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose checkpoint lies in its own folder writes it again: killed on the way, it must not have lost it."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hadaptive_q.models.checkpoint.write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        save_model(nano, saved, "another run")
    assert read_training_key(saved) == "what it was trained from"


def test_weights_hold_tensors_only_and_share_none(saved: Path, nano: HadaptiveNet) -> None:
    tensors = load_file(saved)
    assert tensors.keys() == nano.state_dict().keys()
    assert not any("pair_" in name or "noise" in name for name in tensors)


# What is wrong, how it is made, and what the message says about it.
DAMAGE: list[tuple[str, Callable[[Path], object], str]] = [
    ("no file", lambda p: p.unlink(), "got no such file; expected a .safetensors file, its folder, or a .pt file"),
    ("no json", lambda p: p.with_suffix(".json").unlink(), "got no model.json beside it"),
    ("truncated", lambda p: p.write_bytes(p.read_bytes()[:-100]), "expected a whole safetensors file"),
    ("header cut", lambda p: p.write_bytes(p.read_bytes()[:50]), "expected a whole safetensors file"),
    ("empty", lambda p: p.write_bytes(b""), "expected a whole safetensors file"),
    ("not safetensors", lambda p: p.write_bytes(b"\x80\x04}." * 99), "expected a whole safetensors file"),
    ("json cut", lambda p: p.with_suffix(".json").write_text('{"format": 1, "mo'), "expected the JSON written with"),
    ("json binary", lambda p: p.with_suffix(".json").write_bytes(b"\xff\xfe\x00"), "expected the JSON written with"),
    ("json list", lambda p: p.with_suffix(".json").write_text("[]"), "model.json"),
    ("json foreign", lambda p: p.with_suffix(".json").write_text('{"hidden_size": 8}'), "model.json, model"),
    ("unknown key", lambda p: change_config(p, lambda c: c.update(extra=1)), "model.json, extra: got 1"),
    (
        "impossible shape",
        lambda p: change_config(p, lambda c: c["model"]["blocks"][2].update(cs=99)),
        "'cs must lie in [2, 16], got 99'",
    ),
    ("cs 1", lambda p: change_config(p, lambda c: c["model"]["blocks"][2].update(cs=1)), "cs >= 2"),
    (
        "other classes",
        lambda p: change_config(p, lambda c: c["model"].update(num_classes=11)),
        "head.classifier.bias: got shape (10,); expected (11,)",
    ),
    (
        "missing tensor",
        lambda p: change_tensors(p, lambda t: t.pop("tail.conv.weight")),
        "got 1 tensors missing, 0 unknown (such as tail.conv.weight)",
    ),
    (
        "unknown tensor",
        lambda p: change_tensors(p, lambda t: t.update(extra=torch.zeros(1))),
        "got 0 tensors missing, 1 unknown (such as extra)",
    ),
    (
        "wrong shape",
        lambda p: change_tensors(p, lambda t: t.update({"tail.conv.weight": torch.zeros(40, 24)})),
        "tail.conv.weight: got shape (40, 24); expected (40, 24, 1, 1)",
    ),
    *(
        (
            f"NaN in {name}",
            lambda p, name=name: change_tensors(p, lambda t: t[name].view(-1)[:1].fill_(float("nan"))),
            f"{name}: got NaN or infinity",
        )
        for name in (
            "tail.conv.weight",
            "blocks.2.expansion.norm.alpha",
            "blocks.3.expansion.norm.running_var",
            "blocks.2.expansion.scorer.tau",
        )
    ),
    (
        "infinity",
        lambda p: change_tensors(p, lambda t: t["head.hidden.bias"][0].fill_(float("-inf"))),
        "head.hidden.bias: got NaN or infinity",
    ),
]


def header(path: Path, content: bytes, length: int | None = None) -> None:
    """Give the safetensors file at `path` another header, which says it has `length` bytes."""
    old = path.read_bytes()
    body = old[8 + int.from_bytes(old[:8], "little") :]
    path.write_bytes((len(content) if length is None else length).to_bytes(8, "little") + content + body)


def twice(path: Path) -> None:
    """Name one tensor twice."""
    old = path.read_bytes()
    content = old[8 : 8 + int.from_bytes(old[:8], "little")].rstrip()
    entry = b'"tail.conv.weight":{"dtype":"F32","shape":[40,24,1,1],"data_offsets":[0,3840]}'
    header(path, content[:-1] + b"," + entry + b"}")


def lie(path: Path, **fields: object) -> None:
    change_config(path, lambda c: c["model"].update(fields))  # type: ignore[attr-defined]


WHOLE = "expected a whole safetensors file"
DAMAGE += [
    ("header of 16 exabytes", lambda p: header(p, b"{}", 2**64 - 1), WHOLE),
    ("header beyond the file", lambda p: header(p, b"{}", 10**7), WHOLE),
    ("header of brackets", lambda p: header(p, b"[" * 10**5), WHOLE),
    ("no tensors", lambda p: header(p, b"{}"), WHOLE),
    ("a tensor twice", twice, WHOLE),
    ("link to nowhere", lambda p: (p.unlink(), p.symlink_to("nowhere")), "got no such file"),
    ("link to itself", lambda p: (p.unlink(), p.symlink_to(p.name)), "got no such file"),
    ("json of brackets", lambda p: p.with_suffix(".json").write_text("[" * 10**5), "expected the JSON written with"),
    (
        "json of a long number",
        lambda p: p.with_suffix(".json").write_text("9" * 5000),
        "expected the JSON written with",
    ),
    ("terabytes of weights", lambda p: lie(p, tail=10**9, hidden=10**9), "expected (10, 1000000000)"),
    ("more than a number holds", lambda p: lie(p, tail=10**30), "the configuration of a network"),
    ("impossible dropout", lambda p: lie(p, dropout=7.0), "the configuration of a network"),
    ("no blocks", lambda p: lie(p, blocks=[]), "unknown"),
    (
        "whole numbers",
        lambda p: change_tensors(p, lambda t: t.update({"head.hidden.bias": t["head.hidden.bias"].long()})),
        "head.hidden.bias: got torch.int64; expected numbers like torch.float32",
    ),
    (
        "beyond float32",
        lambda p: change_tensors(p, lambda t: t.update({"head.hidden.bias": t["head.hidden.bias"].double() + 1e300})),
        "head.hidden.bias: got NaN or infinity",
    ),
]


@pytest.mark.parametrize(("damage", "message"), [case[1:] for case in DAMAGE], ids=[case[0] for case in DAMAGE])
def test_what_is_not_a_checkpoint_is_refused(damage: Callable[[Path], object], message: str, saved: Path) -> None:
    damage(saved)
    with pytest.raises(UserError) as caught:
        load_model(saved)
    assert str(caught.value).startswith(f"checkpoint {saved.parent}")
    assert message in str(caught.value)


def test_steps_of_the_temperature_that_were_never_taken_are_no_damage(tmp_path: Path) -> None:
    save_model(create_model("hadaptive_net_nano"), tmp_path / "model.safetensors")
    assert load_file(tmp_path / "model.safetensors")["blocks.2.expansion.scorer.gradient_norm"].isnan()
    load_model(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.safetensors: got no such file"):
        load_model(tmp_path)


def test_weights_of_another_variant_are_refused(saved: Path) -> None:
    other = saved.parent / "other.safetensors"
    save_model(create_model("hadaptive_net_nano", 10, hidden=50), other)
    shutil.copy(other, saved)
    with pytest.raises(UserError, match=r"head\.classifier\.weight: got shape \(10, 50\); expected \(10, 48\)"):
        load_model(saved)
