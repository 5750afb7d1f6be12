from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hadaptive_q.models.ach import ACH
from hadaptive_q.models.hadaptive_net import HadaptiveNet
from hadaptive_q.rewrite.freeze_selection import freeze_selection


def scores_of(model: HadaptiveNet, inputs: Tensor) -> dict[str, Tensor]:
    """Return the scores (B, C) of every ACH on `inputs`."""
    found: dict[str, Tensor] = {}
    hooks = [
        module.scorer.register_forward_hook(lambda _m, _i, out, name=name: found.update({name: out}))
        for name, module in model.ach_modules()
    ]
    with torch.no_grad():
        model(inputs)
    for hook in hooks:
        hook.remove()
    return found


def vote(scores: Tensor, cs: int) -> list[int]:
    """The rule in plain Python: the channel at rank r of a sample gets cs - r points."""
    points: Counter[int] = Counter()
    for row in scores.tolist():
        for rank, channel in enumerate(sorted(range(len(row)), key=lambda c: -row[c])[:cs]):
            points[channel] += cs - rank
    return [channel for channel, _ in points.most_common(cs)]


def test_the_channels_with_most_points_are_frozen(nano: HadaptiveNet, inputs: Tensor) -> None:
    scores = scores_of(nano, inputs)
    chosen = freeze_selection(nano, inputs.split(10))
    assert list(chosen) == [name for name, _ in nano.ach_modules()]
    for name, module in nano.ach_modules():
        assert chosen[name] == vote(scores[name], module.cs), name
        assert module.frozen is not None
        assert module.frozen.tolist() == chosen[name]


def test_how_images_are_batched_does_not_matter(make_nano: Callable[..., HadaptiveNet], inputs: Tensor) -> None:
    whole, one_by_one = make_nano(), make_nano()
    assert freeze_selection(whole, [inputs]) == freeze_selection(one_by_one, inputs.split(1))


def test_channel_order_is_kept_for_a_network_trained_so(make_nano: Callable[..., HadaptiveNet], inputs: Tensor) -> None:
    chosen = freeze_selection(make_nano("channel"), [inputs])
    assert all(channels == sorted(channels) for channels in chosen.values())


def test_the_frozen_network_selects_alike_for_all_and_asks_no_scorer(nano: HadaptiveNet, inputs: Tensor) -> None:
    with torch.no_grad():
        dynamic = nano(inputs)
        freeze_selection(nano.train(), [inputs])
        assert not nano.training
        assert scores_of(nano, inputs) == {}
        static = nano(inputs)
    assert static.isfinite().all()
    assert not torch.equal(static, dynamic), "these images do not all choose alike, so something must change"


def test_images_that_all_choose_alike_change_nothing(nano: HadaptiveNet, inputs: Tensor) -> None:
    with torch.no_grad():
        wanted = nano(inputs[:1])
        freeze_selection(nano, [inputs[:1]])
        torch.testing.assert_close(nano(inputs[:1]), wanted, rtol=1e-5, atol=1e-6)


def test_no_hook_stays_behind(nano: HadaptiveNet, inputs: Tensor) -> None:
    freeze_selection(nano, [inputs])
    assert not any(module.scorer._forward_hooks for _, module in nano.ach_modules())


@pytest.mark.parametrize("order", ["rank", "channel"])
def test_a_vote_weighs_ranks(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Channel 3 is second twice and beats channel 0, which is first once and third once only."""
    ach = ACH(4, 2, slot_order=order)  # type: ignore[arg-type]
    scores = torch.tensor([[9.0, 0, 1, 8], [5, 9, 1, 8], [1, 9, 0, 8]])

    class Net(torch.nn.Module):
        def ach_modules(self) -> list[tuple[str, ACH]]:
            return [("it", ach)]

        def forward(self, rows: Tensor) -> None:
            ach.scorer(rows)

    monkeypatch.setattr(ach.scorer, "forward", lambda rows: rows)
    # Points: channel 0 has 2, channel 1 has 4, channel 3 has 3.
    assert freeze_selection(Net(), [scores])["it"] == [1, 3]  # type: ignore[arg-type]
