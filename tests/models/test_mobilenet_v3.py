"""MobileNetV3-Small has the published size, and its gate is a factor per channel between 0 and 1."""

from __future__ import annotations

import pytest
import torch

from hadaptive_q.models.families import create_model
from hadaptive_q.models.mobilenet_v3 import Gate, rounded
from hadaptive_q.models.network import count_macs, count_parameters


def test_parameters_and_macs_are_the_published_ones() -> None:
    model = create_model("mobilenet_v3_small", 1000)
    assert count_parameters(model) == 2_542_856
    assert round(count_macs(model, 224) / 1e6) == 57  # the paper says 56, of a network without biases


@pytest.mark.parametrize(("channels", "wanted"), [(4, 8), (16 / 4, 8), (96 / 4, 24), (72 / 4, 24), (576 / 4, 144)])
def test_inner_channels_come_in_eights(channels: float, wanted: int) -> None:
    assert rounded(channels) == wanted


def test_a_gate_scales_whole_channels() -> None:
    torch.manual_seed(0)
    gate, x = Gate(16).eval(), torch.randn(3, 16, 5, 7)
    with torch.no_grad():
        gate.excite.weight.mul_(20)
        factors = gate(x) / x
    torch.testing.assert_close(factors, factors[..., :1, :1].expand_as(factors))
    assert float(factors.min()) >= 0
    assert float(factors.max()) <= 1
    assert float(factors.std()) > 0.01
