from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hadaptive_q.errors import UserError
from hadaptive_q.models.ach import ACH
from hadaptive_q.models.blocks import Bottleneck, Ghost
from hadaptive_q.models.checkpoint import load_model
from hadaptive_q.models.config import VARIANTS, ACHConfig, GhostConfig
from hadaptive_q.models.families import create_model
from hadaptive_q.models.hadaptive_net import HadaptiveNet
from hadaptive_q.models.network import count_macs, count_parameters

PUBLISHED = {
    "hadaptive_net_s": (2_102_632, 131.0),
    "hadaptive_net_m": (3_096_228, 338.7),
    "hadaptive_net_l": (6_110_638, 668.9),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_macs_are_the_papers(name: str) -> None:
    parameters, millions = PUBLISHED[name]
    model = create_model(name, 100)
    assert count_parameters(model) == parameters
    assert round(count_macs(model, 224) / 1e6, 1) == millions


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("classes", [1, 7])
def test_every_variant_answers_at_its_smallest_image(name: str, classes: int) -> None:
    model = create_model(name, classes).eval()
    with torch.no_grad():
        logits = model(torch.randn(2, 3, model.config.stride, model.config.stride))
    assert logits.shape == (2, classes)
    assert logits.isfinite().all()


def test_the_stride_is_the_smallest_image() -> None:
    model = create_model("hadaptive_net_nano").eval()
    assert model.config.stride == 16
    with pytest.raises(RuntimeError, match="size"):
        model(torch.zeros(1, 3, 15, 15))


def test_the_authors_nano_network(golden: Path) -> None:
    vectors = np.load(golden / "nano.npz")
    with torch.no_grad():
        logits = load_model(golden / "nano_conductor.pt")(torch.from_numpy(vectors["x"]))
    assert np.abs(logits.numpy() - vectors["y"]).max() <= 1e-4  # absolute, as the vectors were published
    assert np.abs(vectors["y"]).max() > 0.1  # and not because everything is near zero


@pytest.mark.parametrize("image", [(33, 47), (64, 32)])
def test_images_need_not_be_square_or_divisible(image: tuple[int, int], nano: HadaptiveNet) -> None:
    with torch.no_grad():
        assert nano(torch.randn(1, 3, *image)).isfinite().all()


def test_logits_do_not_depend_on_the_strides_of_the_input(nano: HadaptiveNet) -> None:
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, got = nano(x), nano(x.contiguous(memory_format=torch.channels_last))
    # Another layout is another convolution kernel: sums in another order, selections unchanged.
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_initialisation_is_reproducible_and_as_released() -> None:
    torch.manual_seed(3)
    one = create_model("hadaptive_net_nano")
    torch.manual_seed(3)
    other = create_model("hadaptive_net_nano")
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b) or a.isnan().all(), name
    assert not one.head.classifier.bias.any()
    weight = one.head.hidden.weight  # Xavier normal: std sqrt(2 / (in + out)), known to 2 % from 1,920 draws
    assert float(weight.detach().std()) == pytest.approx((2 / sum(weight.shape)) ** 0.5, rel=0.1)


def test_training_reaches_every_parameter(nano: HadaptiveNet) -> None:
    nano.train()(torch.randn(8, 3, 32, 32)).square().sum().backward()
    without = [n for n, p in nano.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_ach_modules_come_in_the_order_of_the_data(nano: HadaptiveNet) -> None:
    names = [name for name, _ in nano.ach_modules()]
    assert names == ["blocks.2.expansion", "blocks.3.expansion", "blocks.5.expansion"]
    assert [module.cs for _, module in nano.ach_modules()] == [6, 6, 8]


def test_overrides_replace_fields_of_the_variant() -> None:
    model = create_model("hadaptive_net_nano", 4, slot_order="channel", dropout=0.1)
    assert (model.config.num_classes, model.config.slot_order, model.head.dropout.p) == (4, "channel", 0.1)
    assert {module.slot_order for _, module in model.ach_modules()} == {"channel"}


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"model 'hadaptive_net_xs'.*one of .*hadaptive_net_m.*did you mean"):
        create_model("hadaptive_net_xs")


def test_counting_macs_leaves_the_mode_alone(nano: HadaptiveNet) -> None:
    for training in (True, False):
        count_macs(nano.train(training), 32)
        assert nano.training is training


@pytest.mark.parametrize(
    ("config", "channels"),
    [
        (GhostConfig(channels=8, ratio=4, k=3, s=1), 32),
        (GhostConfig(channels=8, ratio=1.9, k=3, s=1), 16),  # int(8 * 1.9) = 15, rounded up to two halves
        (ACHConfig(channels=8, cs=4, k=5, s=1), 14),
    ],
)
def test_expansions(config: GhostConfig | ACHConfig, channels: int) -> None:
    block = Bottleneck(8, config, "rank").eval()
    assert isinstance(block.expansion, ACH if isinstance(config, ACHConfig) else Ghost)
    assert block.expansion.out_channels == block.depthwise.conv.in_channels == channels
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        assert block.expansion(x).shape == (2, channels, 6, 6)


@pytest.mark.parametrize(
    ("c1", "s", "k", "residual", "size"),
    [(8, 1, 5, True, 6), (8, 1, 7, True, 6), (6, 1, 3, False, 6), (8, 2, 5, False, 3)],
)
def test_bottleneck_shape_and_residual(c1: int, s: int, k: int, residual: bool, size: int) -> None:
    torch.manual_seed(0)
    block = Bottleneck(c1, GhostConfig(channels=8, ratio=2, k=k, s=s), "rank").eval()
    assert block.depthwise.conv.kernel_size == ((2, 2) if s == 2 else (k, k))
    x = torch.randn(2, c1, 6, 6)
    with torch.no_grad():
        y = block(x)
        assert y.shape == (2, 8, size, size)
        inner = block.projection(block.depthwise(block.expansion(x)))
        assert torch.equal(y, inner + x if residual else inner)
