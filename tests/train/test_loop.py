"""The training loop: what it learns, that it repeats, and that a killed run ends as if it had not been killed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hadaptive_q import errors, pipeline
from hadaptive_q.data.datasets import ImageData, TensorSplit
from hadaptive_q.data.transforms import normalise
from hadaptive_q.errors import UserError
from hadaptive_q.models.families import create_model
from hadaptive_q.models.hadaptive_net import HadaptiveNet
from hadaptive_q.recipe import AugmentConfig, TrainConfig, load_recipe
from hadaptive_q.rewrite.graph import trace
from hadaptive_q.train import compiler
from hadaptive_q.train.loop import Training, discard_state, predict, train
from hadaptive_q.train.resume import load_state, save_state

# 96 images in batches of 32: three steps an epoch.
CONFIG = TrainConfig(epochs=3, batch_size=32, lr=0.003, precision="float32")
STILL = AugmentConfig(degrees=0, translate=0, scale=0, mirror=False)


def fresh() -> HadaptiveNet:
    torch.manual_seed(7)
    return create_model("hadaptive_net_nano", 10).train()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Everything a checkpoint holds; NaN, which equals nothing, stands for steps not taken."""
    return {name: tensor.nan_to_num(-1.0) for name, tensor in copy.deepcopy(model.state_dict()).items()}


def assert_same(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert different == []


class Killed(Exception):
    """Stands for whatever ends a process."""


def killer(epoch: int) -> Callable[[nn.Module, int], None]:
    def on_epoch(_: nn.Module, now: int) -> None:
        if now == epoch:
            raise Killed

    return on_epoch


def test_training_learns(few_digits: ImageData) -> None:
    config = CONFIG.model_copy(update={"epochs": 25, "lr": 0.005, "augment": STILL})
    model = train(fresh(), few_digits, Training(config, 0, "test")).eval()
    logits, labels = predict(model, few_digits.train, few_digits.preprocess)
    # Chance is 10 of 96, with a standard deviation of 3.
    assert int((logits.argmax(1) == labels).sum()) > 80


def test_training_repeats_exactly_and_follows_its_seed(few_digits: ImageData) -> None:
    one, again, other = (train(fresh(), few_digits, Training(CONFIG, seed, "test")) for seed in (1, 1, 2))
    assert_same(one, again)
    assert not torch.equal(weights(one)["tail.conv.weight"], weights(other)["tail.conv.weight"])


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("epoch", [1, 2])
def test_a_killed_run_continues_to_the_same_weights(
    ema: float, epoch: int, few_digits: ImageData, tmp_path: Path
) -> None:
    whole = Training(CONFIG.model_copy(update={"ema": ema}), 3, "test")
    uninterrupted = train(fresh(), few_digits, whole)

    kept = replace(whole, state_file=tmp_path / "float.state", key="recipe and data")
    with pytest.raises(Killed):
        train(fresh(), few_digits, replace(kept, on_epoch=killer(epoch)))
    assert [p.name for p in tmp_path.iterdir()] == ["float.state"]

    epochs: list[int] = []
    torch.manual_seed(99)  # another process: other random numbers, other starting weights
    stranger = create_model("hadaptive_net_nano", 10).train()
    resumed = train(stranger, few_digits, replace(kept, on_epoch=lambda _, now: epochs.append(now)))
    assert epochs == list(range(epoch, 3))
    assert_same(resumed, uninterrupted)

    discard_state(kept)
    assert list(tmp_path.iterdir()) == []
    discard_state(kept)  # nothing to discard is no error


def test_a_finished_state_trains_no_further(few_digits: ImageData, tmp_path: Path) -> None:
    training = Training(CONFIG, 0, "test", tmp_path / "state", "key")
    done = train(fresh(), few_digits, training)
    assert_same(train(fresh(), few_digits, replace(training, on_epoch=killer(2))), done)


def test_a_state_of_another_training_is_ignored(few_digits: ImageData, tmp_path: Path) -> None:
    one = Training(CONFIG, 0, "test", tmp_path / "state", "one")
    with pytest.raises(Killed):
        train(fresh(), few_digits, replace(one, on_epoch=killer(2)))
    assert load_state(tmp_path / "state", "one") is not None
    assert load_state(tmp_path / "state", "other") is None
    other = train(fresh(), few_digits, replace(one, key="other"))
    assert_same(other, train(fresh(), few_digits, Training(CONFIG, 0, "test")))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_damaged_state_is_refused(share: float, few_digits: ImageData, tmp_path: Path) -> None:
    path = tmp_path / "float.state"
    save_state(path, "key", {"epoch": 1, "model": fresh().state_dict()})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match=r"float\.state: got a damaged training state; expected .*; delete it"):
        train(fresh(), few_digits, Training(CONFIG, 0, "test", path, "key"))


def test_a_state_with_code_is_refused(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "exploded",)

    torch.save({"key": "key", "model": Bomb()}, tmp_path / "state")
    with pytest.raises(UserError, match="a damaged training state"):
        load_state(tmp_path / "state", "key")
    assert not (tmp_path / "exploded").exists()


def test_a_state_of_another_kind_is_ignored(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "state")
    assert load_state(tmp_path / "state", "key") is None
    assert load_state(tmp_path / "missing", "key") is None


def test_the_average_follows_the_weights(few_digits: ImageData) -> None:
    """One step an epoch, so that the weights after every step can be read at the start of the next epoch."""
    config = CONFIG.model_copy(update={"batch_size": 96})
    path: list[dict[str, Tensor]] = []
    plain = train(fresh(), few_digits, Training(config, 0, "test", on_epoch=lambda m, _: path.append(weights(m))))
    path.append(weights(plain))

    averaged = train(fresh(), few_digits, Training(config.model_copy(update={"ema": 0.75}), 0, "test"))
    for name, parameter in averaged.named_parameters():
        wanted = path[0][name]
        for after in path[1:]:
            wanted = 0.75 * wanted + 0.25 * after[name]
        torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-5, atol=1e-7)
    assert not torch.equal(averaged.tail.conv.weight, plain.tail.conv.weight)


def test_noise_is_annealed_over_the_steps(few_digits: ImageData) -> None:
    noises: list[float] = []

    def loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        noises.append(float(next(m for n, m in model.named_modules() if n == "blocks.2.expansion").noise))
        return nn.functional.cross_entropy(model(inputs), labels)

    train(fresh(), few_digits, Training(CONFIG.model_copy(update={"noise_until": 0.5}), 0, "test", loss=loss))
    assert noises == pytest.approx([1, 1 - 1 / 4.5, 1 - 2 / 4.5, 1 - 3 / 4.5, 1 - 4 / 4.5, 0, 0, 0, 0])


def test_matrices_alone_decay_and_scalars_move_at_a_tenth(few_digits: ImageData) -> None:
    config = TrainConfig(epochs=1, batch_size=96, lr=0.01, weight_decay=0.5, warmup=0, precision="float32")

    def moved(loss: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        model = fresh()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        train(model, few_digits, Training(config, 0, "test", loss=loss))
        return {n: (before[n], p.detach()) for n, p in model.named_parameters()}

    # Without a gradient Adam stands still and only decay is left.
    for name, (before, after) in moved(lambda model, inputs, _: model(inputs).sum() * 0).items():
        decays = before.dim() > 1 and before.numel() > 1
        torch.testing.assert_close(after, before * (1 - 0.01 * 0.5) if decays else before, rtol=1e-6, atol=0)
        assert decays == name.endswith("weight") or "bn" in name or "norm" in name, name

    # Adam's first step is the learning rate, whatever the size of the gradient.
    def pull(model: nn.Module, inputs: Tensor, _: Tensor) -> Tensor:
        return model(inputs).sum() * 0 + sum(p.sum() for p in model.parameters() if p.dim() <= 1 or p.numel() == 1)

    for before, after in moved(pull).values():
        if before.dim() <= 1:
            rate = 0.001 if before.numel() == 1 else 0.01
            torch.testing.assert_close(after, before - rate, rtol=0, atol=1e-6)


def test_a_split_smaller_than_a_batch_still_trains(few_digits: ImageData) -> None:
    assert isinstance(few_digits.train, TensorSplit)
    split = few_digits.train
    tiny = TensorSplit(split.images[:10], split.labels[:10], split.identities[:10])
    data = ImageData("tiny", few_digits.preprocess, tiny, tiny, mirror=False)
    seen: list[int] = []

    def loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        seen.append(len(labels))
        return nn.functional.cross_entropy(model(inputs), labels)

    train(fresh(), data, Training(CONFIG, 0, "test", loss=loss))
    assert seen == [10, 10, 10]


def test_every_image_is_seen_once_an_epoch_in_another_order(few_digits: ImageData) -> None:
    seen: list[list[float]] = []

    def loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        seen.append(inputs.sum((1, 2, 3)).tolist())
        return nn.functional.cross_entropy(model(inputs), labels)

    train(fresh(), few_digits, Training(CONFIG.model_copy(update={"augment": STILL}), 0, "test", loss=loss))
    epochs = [[*seen[i], *seen[i + 1], *seen[i + 2]] for i in (0, 3, 6)]
    assert [len(epoch) for epoch in epochs] == [96, 96, 96]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_loss_that_is_no_number_ends_training(few_digits: ImageData) -> None:
    losses = iter([1.0, 1.0, 1.0, 1.0, float("nan")])

    def loss(model: nn.Module, inputs: Tensor, _: Tensor) -> Tensor:
        return model(inputs).sum() * 0 + next(losses)

    with pytest.raises(FloatingPointError, match="test: loss is nan in epoch 2"):
        train(fresh(), few_digits, Training(CONFIG, 0, "test", loss=loss))


def test_mixed_precision_leaves_a_plain_float_network(few_digits: ImageData) -> None:
    config = CONFIG.model_copy(update={"precision": "bf16", "epochs": 1})
    model = train(fresh(), few_digits, Training(config, 0, "test")).eval()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    clean = create_model("hadaptive_net_nano", 10).eval()
    clean.load_state_dict(model.state_dict())
    inputs = normalise(torch.stack([few_digits.val[i][0] for i in range(4)]), few_digits.preprocess)
    with torch.no_grad():
        wanted = clean(inputs)
        assert torch.equal(model(inputs), wanted), "still runs in half precision"
        graph = trace(model, 32)
        assert list(graph.graph.nodes)[-1].op == "output"
        assert not [name for name, _ in graph.named_children() if name.startswith("submod")]
        torch.testing.assert_close(graph(inputs), wanted, rtol=1e-5, atol=1e-7)
    # And it can be trained again, in another precision.
    train(model.train(), few_digits, Training(CONFIG, 1, "test"))


def test_predict_answers_a_whole_split_in_order(few_digits: ImageData, nano: HadaptiveNet) -> None:
    logits, labels = predict(nano, few_digits.val, few_digits.preprocess, batch_size=20)  # 20, 20, 8
    assert logits.shape == (48, 10)
    assert labels.tolist() == [few_digits.val[i][1] for i in range(48)]
    assert not logits.requires_grad
    for index in (0, 19, 20, 47):
        image = normalise(few_digits.val[index][0][None], few_digits.preprocess)
        with torch.no_grad():
            torch.testing.assert_close(logits[index : index + 1], nano(image), rtol=1e-4, atol=1e-5)


def test_curves_for_tensorboard_leave_the_weights_alone(few_digits: ImageData, tmp_path: Path) -> None:
    """The event file read back by the library that will show it; a killed epoch's steps are there once."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logged = Training(CONFIG, 1, "float", tmp_path / "state", "key", tensorboard=tmp_path / "curves")
    with pytest.raises(Killed):
        train(fresh(), few_digits, replace(logged, on_epoch=killer(2)))
    assert_same(train(fresh(), few_digits, logged), train(fresh(), few_digits, Training(CONFIG, 1, "float")))
    found = events.EventAccumulator(str(tmp_path / "curves" / "float")).Reload()
    assert set(found.Tags()["scalars"]) == {"loss", "learning_rate", "gradient_norm"}
    losses = found.Scalars("loss")
    assert [event.step for event in losses] == list(range(9)), "three epochs of three steps"
    assert all(0 < event.value < 10 for event in losses)
    rates = [event.value for event in found.Scalars("learning_rate")]
    assert rates[0] == pytest.approx(CONFIG.lr)
    assert rates == sorted(rates, reverse=True), "a cosine, also where the killed run went on"


def test_tensorboard_that_is_not_installed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"--tensorboard: got no tensorboard .*pip install tensorboard"):
        pipeline.quantize(load_recipe("int8"), tmp_path / "out", tensorboard=tmp_path / "curves")
    with pytest.raises(UserError, match="pip install tensorboard"):
        pipeline.train_float(load_recipe("float"), tmp_path / "out", tensorboard=tmp_path / "curves")
    assert not list(tmp_path.iterdir())


def test_a_step_may_take_several_batches(few_digits: ImageData) -> None:
    """Without BatchNorm, dropout and noise, two batches of 48 make the step of one of 96."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.Hardswish(), nn.Flatten(), nn.Linear(256, 10)).double()

    def loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(inputs.double()), labels)

    settings = {"augment": STILL, "warmup": 0.0, "epochs": 2}
    results = []
    for batch_size, accumulate in ((96, 1), (48, 2), (48, 5)):  # of 5 an epoch has 2
        config = CONFIG.model_copy(update={**settings, "batch_size": batch_size, "accumulate": accumulate})
        results.append(weights(train(copy.deepcopy(plain), few_digits, Training(config, 0, "test", loss=loss))))
    for other in results[1:]:
        for name, wanted in results[0].items():
            torch.testing.assert_close(other[name], wanted, rtol=1e-7, atol=1e-9)


def test_learning_rates_follow_steps_and_batches_that_make_none_are_left(few_digits: ImageData) -> None:
    seen: list[int] = []
    rates: list[float] = []

    def loss(model: nn.Module, inputs: Tensor, _: Tensor) -> Tensor:
        seen.append(len(inputs))
        return model(inputs).sum()

    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    config = CONFIG.model_copy(update={"accumulate": 2, "epochs": 2, "warmup": 0.0})  # three batches an epoch
    train(nn.Conv2d(3, 1, 3), few_digits, Training(config, 0, "test", loss=loss))
    hook.remove()
    assert seen == [32] * 4
    assert rates == pytest.approx([0.003, 0.0015])


def test_a_compiled_training_is_the_same(few_digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches the compiler computes what was written; code is not generated here, which takes minutes."""
    asked: list[nn.Module] = []

    def compile_(module: nn.Module) -> None:
        asked.append(module)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", compile_)
    config = CONFIG.model_copy(update={"epochs": 1})
    compiled = train(fresh(), few_digits, Training(config.model_copy(update={"compile": True}), 0, "test"))
    assert len(asked) == 1
    assert "_compiled_call_impl" not in vars(compiled)
    for name, wanted in weights(train(fresh(), few_digits, Training(config, 0, "test"))).items():
        torch.testing.assert_close(weights(compiled)[name], wanted, rtol=1e-4, atol=1e-5)


def test_compiling_without_a_compiler_is_refused(few_digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise compiler.InvalidCxxCompiler

    monkeypatch.setattr(compiler, "get_cpp_compiler", none)
    with pytest.raises(UserError, match=r"compile: true: got no compiler; expected a C\+\+ compiler, such as g\+\+"):
        train(fresh(), few_digits, Training(CONFIG.model_copy(update={"compile": True}), 0, "test"))


def test_channels_last_changes_roundings_only_and_leaves_no_trace(few_digits: ImageData) -> None:
    strides: list[bool] = []

    def loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        strides.append(inputs.is_contiguous(memory_format=torch.channels_last))
        return nn.functional.cross_entropy(model(inputs), labels)

    config = CONFIG.model_copy(update={"epochs": 1, "lr": 1e-6, "channels_last": True})
    model = train(fresh(), few_digits, Training(config, 0, "test", loss=loss))
    assert strides == [True] * 3
    assert all(p.is_contiguous() for p in model.parameters())
    wanted = train(fresh(), few_digits, Training(config.model_copy(update={"channels_last": False}), 0, "test"))
    for name, tensor in wanted.named_buffers():
        if "running" in name:
            torch.testing.assert_close(model.get_buffer(name), tensor, rtol=1e-3, atol=1e-4)
