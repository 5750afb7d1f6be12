"""The authors' checkpoints: every published layout loads, and nothing in a file executes or slips through."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hadaptive_q.errors import UserError
from hadaptive_q.models.checkpoint import load_model, save_model
from hadaptive_q.models.conductor import parse_description
from hadaptive_q.models.config import VARIANTS, ACHConfig, BlockConfig, HadaptiveNetConfig
from hadaptive_q.models.cross_hadamard import pair_indices

LAYOUTS = {"s": "hadaptive_net_s", "m": "hadaptive_net_m", "l": "hadaptive_net_l"}


def describe(config: HadaptiveNetConfig) -> dict[str, Any]:
    """Write `config` as the authors do: the inverse of `parse_description`."""

    def conv(channels: int, k: int, s: int, act: bool) -> list[Any]:
        return [-1, 1, "ConvNormAct", [[channels, k, s], "BatchNorm2d", "Hardswish" if act else None]]

    def block(b: BlockConfig) -> list[Any]:
        if isinstance(b, ACHConfig):
            norm = {"dysoft": "DySoft", "batch_norm": "BN"}[b.norm]
            return [-1, 1, "AdaptiveBottleneck", [b.channels, "Hada", b.cs, b.k, b.s, norm]]
        return [-1, 1, "AdaptiveBottleneck", [b.channels, "Ghost", b.ratio, b.k, b.s]]

    stem = [conv(c.channels, c.k, c.s, c.act) for c in config.stem]
    backbone = [*stem, *(block(b) for b in config.blocks), conv(config.tail, 1, 1, True)]
    head = [[-1, 1, "Classifier", [config.num_classes, config.hidden, config.dropout]]]
    return {"nc": config.num_classes, "task": "classify", "backbone": backbone, "head": head}


def random_state(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        leaf = name.rpartition(".")[2]
        if leaf in ("hadamard_i", "hadamard_j"):
            cs = round((1 + (1 + 8 * shape[0]) ** 0.5) / 2)
            state[name] = pair_indices(cs)[leaf.endswith("j")]
        elif leaf in ("num_batches_tracked", "tau_adj"):
            state[name] = torch.tensor(3)
        elif leaf == "running_var":
            state[name] = torch.rand(shape, generator=generator) + 0.5
        else:
            state[name] = torch.randn(shape, generator=generator) * 0.1
    return state


@pytest.fixture
def checkpoint(golden: Path) -> dict[str, Any]:
    """The authors' nano checkpoint, to be damaged."""
    content: dict[str, Any] = torch.load(golden / "nano_conductor.pt", weights_only=True)
    return copy.deepcopy(content)


@pytest.fixture
def refused(tmp_path: Path) -> Callable[[Any], str]:
    """Return a function that writes its argument with torch.save and returns how loading it is refused."""

    def refusal(content: Any) -> str:
        path = tmp_path / "theirs.pt"
        torch.save(content, path)
        with pytest.raises(UserError) as caught:
            load_model(path)
        assert str(caught.value).startswith(f"checkpoint {path}")
        return str(caught.value)

    return refusal


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts_load(layout: str, golden: Path, tmp_path: Path) -> None:
    config = VARIANTS[LAYOUTS[layout]]
    state = random_state(json.loads((golden / "conductor_keys.json").read_text())[layout])
    path = tmp_path / "theirs.pt"
    torch.save(
        {
            "model_desc": describe(config),
            "model_state_dict": state,
            "opt_state_dict": {"state": {0: {"step": torch.tensor(5.0)}}, "param_groups": [{"lr": 1e-3}]},
            "lrs_state_dict": {"last_epoch": 4},
            "epoch": 4,
            "best_fitness": 0.5,
        },
        path,
    )
    model = load_model(path)
    assert model.config == config.model_copy(update={"name": "conductor"})
    # The same weights in the same places: names apart, nothing is added, lost or moved.
    theirs = [t for n, t in state.items() if not n.endswith(("hadamard_i", "hadamard_j", "tau_adj", "tau"))]
    ours = [t for n, t in model.state_dict().items() if not n.endswith(("_norm", "tau"))]
    assert len(ours) == len(theirs)
    assert float(sum(t.double().sum() for t in ours)) == pytest.approx(float(sum(t.double().sum() for t in theirs)))
    with torch.no_grad():
        logits = model(torch.randn(2, 3, config.stride, config.stride))
    assert logits.shape == (2, 100)
    assert logits.isfinite().all()


def test_the_inverse_used_above_is_the_authors_own_form(golden: Path) -> None:
    theirs = json.loads((golden / "nano.json").read_text())
    config = parse_description(theirs)
    assert config == VARIANTS["hadaptive_net_nano"].model_copy(update={"name": "conductor", "num_classes": 10})
    assert describe(config) == theirs


def test_an_imported_checkpoint_is_an_ordinary_one(golden: Path, tmp_path: Path, inputs: torch.Tensor) -> None:
    imported = load_model(golden / "nano_conductor.pt")
    save_model(imported, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(inputs), imported(inputs))


@pytest.mark.parametrize("ending", [".pth", ".ckpt"])
def test_the_ending_of_the_name_does_not_matter(ending: str, golden: Path, tmp_path: Path) -> None:
    path = tmp_path / f"best{ending}"
    path.write_bytes((golden / "nano_conductor.pt").read_bytes())
    assert load_model(path).config.name == "conductor"


def test_repeated_rows_are_unrolled() -> None:
    description = describe(VARIANTS["hadaptive_net_s"])
    once = parse_description(description)
    rows = description["backbone"]
    repeated = [row for i, row in enumerate(rows) if i == 0 or row != rows[i - 1]]
    counts = iter([sum(1 for _ in group) for group in _runs(rows)])
    for row in repeated:
        row[1] = next(counts)
    assert len(repeated) < len(rows)
    assert parse_description({**description, "backbone": repeated}) == once


@pytest.mark.parametrize("repeats", [[10**12], [10**12, -(10**12)]])
def test_rows_repeated_without_end_are_refused(repeats: list[int]) -> None:
    description = describe(VARIANTS["hadaptive_net_nano"])
    for row, count in zip(description["backbone"], repeats, strict=False):
        row[1] = count
    with pytest.raises(ValueError, match="more than 1000 parts"):
        parse_description(description)


def _runs(rows: list[Any]) -> list[list[Any]]:
    runs: list[list[Any]] = []
    for row in rows:
        if runs and runs[-1][0] == row:
            runs[-1].append(row)
        else:
            runs.append([row])
    return runs


def test_left_out_arguments_have_the_authors_defaults() -> None:
    description = describe(VARIANTS["hadaptive_net_s"])
    for row in description["backbone"]:
        if row[3][1] == "Hada":
            row[3].pop()  # the norm: DySoft
    description["head"][0][3] = [100]
    assert parse_description(description) == VARIANTS["hadaptive_net_s"].model_copy(update={"name": "conductor"})


def test_another_pair_order_is_refused(checkpoint: dict[str, Any], refused: Callable[[Any], str]) -> None:
    state = checkpoint["model_state_dict"]
    state["layers.5.block.0.hadamard_i"] = state["layers.5.block.0.hadamard_i"].flip(0)
    message = refused(checkpoint)
    assert "layers.5.block.0.hadamard_i: got another pair order; expected the row-major pairs of 6 channels" in message


class Bomb:
    """An object whose unpickling creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["alone", "beside the weights", "bare pickle"])
def test_code_in_a_file_is_not_executed(
    form: str, checkpoint: dict[str, Any], refused: Callable[[Any], str], tmp_path: Path
) -> None:
    bomb = Bomb(tmp_path / "exploded")
    if form == "bare pickle":
        path = tmp_path / "bare.pt"
        path.write_bytes(pickle.dumps(bomb))
        with pytest.raises(UserError, match="expected a checkpoint of tensors and plain containers"):
            load_model(path)
        content = path.read_bytes()
    else:
        content = bomb if form == "alone" else {**checkpoint, "epoch": bomb}
        assert "expected a checkpoint of tensors and plain containers" in refused(content)
    assert not (tmp_path / "exploded").exists()

    pickle.loads(content if form == "bare pickle" else pickle.dumps(bomb))
    assert (tmp_path / "exploded").exists(), "this bomb would not have gone off anyway"


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_truncated_files_are_refused(share: float, golden: Path, tmp_path: Path) -> None:
    whole = (golden / "nano_conductor.pt").read_bytes()
    path = tmp_path / "theirs.pt"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match="expected a checkpoint of tensors and plain containers"):
        load_model(path)


@pytest.mark.parametrize("content", [b"hello world", b"\x80\x02.", b"\x80\x02}q\x00", b"PK\x03\x04" + b"\0" * 60])
def test_files_of_other_kinds_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "theirs.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match="expected a checkpoint of tensors and plain containers"):
        load_model(path)


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {"fc.weight": torch.zeros(2, 2)}},
        {"model_desc": "text", "model_state_dict": {}},
        {"model_desc": {}, "model_state_dict": [torch.zeros(1)]},
        [1, 2],
        torch.zeros(3),
    ],
    ids=["another tool's", "text for a description", "list for weights", "list", "tensor"],
)
def test_foreign_layouts_are_refused(content: Any, refused: Callable[[Any], str]) -> None:
    assert "got a foreign layout; expected a dict with 'model_desc' and 'model_state_dict'" in refused(content)


# What is wrong, how the authors' content is changed, and what the message names.
CHANGES: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("no backbone", lambda c: c["model_desc"].pop("backbone"), "model_desc: got ''backbone''"),
    ("row too short", lambda c: c["model_desc"]["backbone"].insert(0, [1]), "model_desc"),
    ("unknown layer", lambda c: c["model_desc"]["backbone"][4].__setitem__(2, "C2f"), "rows other than stem"),
    ("unknown expansion", lambda c: c["model_desc"]["backbone"][4][3].__setitem__(1, "SE"), "unknown expansion 'SE'"),
    ("unknown norm", lambda c: c["model_desc"]["backbone"][5][3].__setitem__(5, "DySig"), "product norm 'DySig'"),
    ("unknown activation", lambda c: c["model_desc"]["backbone"][1][3].__setitem__(2, "SiLU"), "unknown norm or act"),
    ("unknown head", lambda c: c["model_desc"]["head"][0].__setitem__(2, "Detect"), "unknown head 'Detect'"),
    ("no head", lambda c: c["model_desc"].update(head=[]), "model_desc"),
    ("no classes", lambda c: c["model_desc"].update(nc=0), "model_desc"),
    ("impossible dropout", lambda c: c["model_desc"]["head"][0][3].__setitem__(2, 2.0), "got 'dropout probability"),
    ("other pairs", lambda c: c["model_desc"]["backbone"][5][3].__setitem__(2, 7), "row-major pairs of 7 channels"),
    ("a number for a tensor", lambda c: c["model_state_dict"].update({"layers.0.conv.weight": 1.0}), "got float"),
    ("unknown tensor", lambda c: c["model_state_dict"].update(x=torch.zeros(1)), "x: got an unknown tensor"),
    ("unnamed tensor", lambda c: c["model_state_dict"].update({7: torch.zeros(1)}), "7: got an unknown tensor"),
    ("stray pairs", lambda c: c["model_state_dict"].update(hadamard_i=torch.zeros(1)), "got an unknown tensor"),
    (
        "pairs in a convolution",
        lambda c: c["model_state_dict"].update({"layers.9.conv.hadamard_i": torch.zeros(1)}),
        "1 unknown (such as tail.conv.hadamard_i)",
    ),
    ("missing tensor", lambda c: c["model_state_dict"].pop("layers.0.conv.weight"), "such as stem.0.conv.weight"),
    (
        "wrong shape",
        lambda c: c["model_state_dict"].update({"layers.0.conv.weight": torch.zeros(8, 3, 3, 3)}),
        "stem.0.conv.weight: got shape (8, 3, 3, 3); expected (8, 3, 2, 2)",
    ),
    (
        "NaN",
        lambda c: c["model_state_dict"]["layers.0.conv.weight"].fill_(float("nan")),
        "stem.0.conv.weight: got NaN or infinity",
    ),
]


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in CHANGES], ids=[case[0] for case in CHANGES])
def test_damaged_content_is_refused_by_name(
    change: Callable[[dict[str, Any]], object],
    message: str,
    checkpoint: dict[str, Any],
    refused: Callable[[Any], str],
) -> None:
    change(checkpoint)
    assert message in refused(checkpoint)
