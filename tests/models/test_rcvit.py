"""CAS-ViT has the sizes that its authors state and their answers, feature map by feature map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hadaptive_q.models.families import create_model
from hadaptive_q.models.network import count_macs, count_parameters
from hadaptive_q.models.rcvit import RCViT, RCViTConfig

GOLDEN = Path(__file__).parent.parent / "golden" / "rcvit_xs_div4.npz"
# Parameters with one head and with two (the published ones), multiply-accumulates in millions at 224; 1000 classes.
SIZES = {
    "rcvit_xs": (2_979_700, 3_200_700, 547),
    "rcvit_s": (5_507_224, 5_764_224, 912),
    "rcvit_m": (12_036_520, 12_421_520, 1859),
    "rcvit_t": (21_250_120, 21_763_120, 3557),
}


@pytest.mark.parametrize("name", SIZES)
def test_parameters_and_macs_are_the_authors(name: str) -> None:
    one, two, macs = SIZES[name]
    assert count_parameters(create_model(name, 1000)) == one
    model = create_model(name, 1000, heads=2)
    assert count_parameters(model) == two
    assert round(count_macs(model, 224) / 1e6) == macs


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.fixture(scope="module")
def network(golden: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> RCViT:
    """The golden network, read from a file as its authors write it."""
    from hadaptive_q.models.checkpoint import load_model

    path = tmp_path_factory.mktemp("authors") / "checkpoint.pth"
    tensors = {name.removeprefix("sd/"): _whole(array) for name, array in golden.items() if name.startswith("sd/")}
    torch.save({"model": tensors, "epoch": 299}, path)
    model = load_model(path)
    assert isinstance(model, RCViT)
    return model


def _whole(array: Tensor) -> Tensor:
    return array.float() if array.is_floating_point() else array


def test_a_golden_file_has_its_shape(network: RCViT) -> None:
    assert isinstance(network.config, RCViTConfig)
    shape = {"widths": (12, 14, 28, 55), "depths": (2, 2, 4, 2), "heads": 2, "ratio": 4, "num_classes": 10}
    assert {key: value for key, value in network.config.model_dump().items() if key in shape} == shape
    assert network.config.name == "rcvit"


@pytest.mark.parametrize("size", [64, 224])
def test_logits_are_golden(size: int, network: RCViT, golden: dict[str, Tensor]) -> None:
    heads: dict[str, Tensor] = {}
    assert network.head.distilled is not None
    for name, layer in (("head", network.head.classifier), ("dist_head", network.head.distilled)):
        layer.register_forward_hook(_keep(heads, name))
    with torch.no_grad():
        logits = network(golden[f"x{size}"].float())
    torch.testing.assert_close(logits, golden[f"logits{size}"], atol=1e-4, rtol=0)
    for name in ("head", "dist_head"):
        torch.testing.assert_close(heads[name], golden[f"{name}{size}"], atol=1e-4, rtol=0)


def test_feature_maps_are_golden(network: RCViT, golden: dict[str, Tensor]) -> None:
    found: dict[str, Tensor] = {}
    blocks = network.blocks
    ends = [1, 2, 4, 5, 9, 10, 12]  # of stages and of what comes down a size between them
    taps = {
        "stem": network.stem,
        "block0.oper_q": blocks[0].mixer.query,  # type: ignore[union-attr]
        "block0.attn": blocks[0].mixer,
        "block0.out": blocks[0],
        "norm": network.head.bn,
        **{f"network.{index}": blocks[end] for index, end in enumerate(ends)},
    }
    handles = [module.register_forward_hook(_keep(found, name)) for name, module in taps.items()]  # type: ignore[union-attr]
    with torch.no_grad():
        network(golden["x64"].float())
    for handle in handles:
        handle.remove()
    for name in taps:
        torch.testing.assert_close(found[name], golden[f"tap64/{name}"], atol=1e-4, rtol=0)


def _keep(found: dict[str, Tensor], name: str) -> Any:
    def hook(_module: object, _inputs: object, output: Tensor) -> None:
        found[name] = output

    return hook


def test_blocks_are_left_out_more_the_deeper_they_are() -> None:
    model = create_model("rcvit_nano", 5, drop_path=0.4)
    assert [block.drop_path.p for block in model.blocks if hasattr(block, "drop_path")] == [0.0, 0.4]  # type: ignore[union-attr]
