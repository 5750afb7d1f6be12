"""ACH takes the place of a pointwise expansion, in our networks and in others'; the rest of them stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hadaptive_q.errors import UserError
from hadaptive_q.models.ach import ACH
from hadaptive_q.models.checkpoint import load_model, save_model
from hadaptive_q.models.families import create_model
from hadaptive_q.models.network import count_macs, count_parameters
from hadaptive_q.models.replace_expansion import nearest_cs, replace_expansion


class FlatBottleneck(nn.Module):
    """An inverted bottleneck whose layers lie side by side, with a depthwise convolution before the expansion, too."""

    def __init__(self, channels: int, wide: int) -> None:
        super().__init__()
        self.dw_start = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.bn0 = nn.BatchNorm2d(channels)
        self.conv_pw = nn.Conv2d(channels, wide, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.act1 = nn.ReLU()
        self.conv_dw = nn.Conv2d(wide, wide, 5, padding=2, groups=wide, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.act2 = nn.ReLU()
        self.squeeze = nn.Conv2d(wide, 4, 1)
        self.excite = nn.Conv2d(4, wide, 1)
        self.conv_pwl = nn.Conv2d(wide, wide, 1, bias=False)  # as many channels out: only the order tells it apart
        self.bn3 = nn.BatchNorm2d(wide)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv_pw(self.bn0(self.dw_start(x)))))
        x = self.act2(self.bn2(self.conv_dw(x)))
        x = x * self.excite(self.squeeze(x.mean((-1, -2), keepdim=True))).sigmoid()
        out: Tensor = self.bn3(self.conv_pwl(x))
        return out


def test_a_foreign_block_keeps_its_ends_and_changes_its_inside() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), FlatBottleneck(8, 24), nn.Conv2d(24, 5, 1))
    start, end = model[1].dw_start.weight.clone(), model[2].weight.clone()
    assert replace_expansion(model, ["1"], cs=5, norm="batch_norm", slot_order="rank") is model
    block = model[1]
    assert isinstance(block.conv_pw, ACH)
    assert (block.conv_pw.cs, block.conv_pw.slot_order, type(block.conv_pw.norm)) == (5, "rank", nn.BatchNorm2d)
    assert block.conv_pw.out_channels == 8 + 10
    assert [type(layer) for layer in (block.bn1, block.act1)] == [nn.Identity] * 2, "ACH has a norm of its own"
    assert (block.conv_dw.groups, block.bn2.num_features, block.squeeze.in_channels) == (18, 18, 18)
    assert (block.excite.out_channels, block.conv_pwl.in_channels) == (18, 18)
    assert (block.conv_pwl.out_channels, block.bn3.num_features) == (24, 24)
    assert torch.equal(block.dw_start.weight, start)
    assert torch.equal(model[2].weight, end)
    out = model(torch.randn(2, 3, 6, 6))
    assert out.shape == (2, 5, 6, 6)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in model.named_parameters() if "tau" not in n)


@pytest.mark.parametrize(("channels", "width"), [(16, 64), (40, 240), (96, 576), (8, 9), (8, 1000)])
def test_the_nearest_width_is_chosen(channels: int, width: int) -> None:
    found = nearest_cs(channels, width)
    off = {cs: abs(channels + cs * (cs - 1) // 2 - width) for cs in range(2, channels + 1)}
    assert off[found] == min(off.values())


def test_a_network_of_ours_is_saved_and_loaded_with_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("mobilenet_v3_nano", 10)
    stem = model.stem[0].conv.weight.clone()
    assert not model.config.selects
    replace_expansion(model, ["blocks.2"])
    assert model.config.selects
    assert [name for name, _ in model.ach_modules()] == ["blocks.2.expansion.conv"]
    assert torch.equal(model.stem[0].conv.weight, stem)
    save_model(model, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), model.eval()(images))


def test_the_variant_is_about_as_large_as_the_network_it_comes_from() -> None:
    plain, with_ach = (create_model(name, 1000) for name in ("mobilenet_v3_small", "mobilenet_v3_small_ach"))
    assert len(list(with_ach.ach_modules())) == 5
    assert 0.75 < count_parameters(with_ach) / count_parameters(plain) < 1, "an expansion by products has fewer weights"
    assert 0.75 < count_macs(with_ach, 224) / count_macs(plain, 224) < 1


@pytest.mark.parametrize(
    ("blocks", "cs", "said"),
    [
        (["blocks.7"], None, "blocks, blocks.7: got the name of no module"),
        (["blocks.0"], None, "blocks, blocks.0: got no pointwise convolution that widens"),
        (["blocks.2"], 17, "cs of blocks.2: got 17; expected 2 to 16"),
        (["blocks.2"], 1, "cs of blocks.2: got 1"),
    ],
)
def test_what_cannot_be_replaced_is_said_before_anything_is(blocks: list[str], cs: int | None, said: str) -> None:
    model = create_model("mobilenet_v3_nano", 10)
    before = {name: id(tensor) for name, tensor in model.named_parameters()}
    with pytest.raises(UserError, match=said):
        replace_expansion(model, [*blocks, "blocks.1"], cs)
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == before


def test_a_family_without_plain_expansions_says_so() -> None:
    with pytest.raises(UserError, match="family hadaptive_net"):
        replace_expansion(create_model("hadaptive_net_nano", 10), ["blocks.0"])
