"""The training loop: the float network's, and the fine-tuning under quantization.

Every random number of an epoch comes from a seed made of `(seed, epoch)`, so a run that was killed continues
to the very same weights on CPU.

Processes that train together share every batch: a step of two with 32 images each is the step of one with 64, up to
float rounding. To that end they draw random numbers for the whole batch, gradients are averaged, and BatchNorm
normalises by the whole batch (see `batch_norm`): statistics of a process's own few images would make another network
of every number of processes. Only the first process writes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from hadaptive_q import processes
from hadaptive_q.data.datasets import ImageData, Split
from hadaptive_q.data.loader import Draw, batches_of, training_batches
from hadaptive_q.data.mix import Mix
from hadaptive_q.data.transforms import Augment, normalise
from hadaptive_q.errors import UserError, require
from hadaptive_q.models.ach import ACH, ChannelScorer
from hadaptive_q.models.config import Preprocess
from hadaptive_q.recipe import TrainConfig
from hadaptive_q.train.batch_norm import synchronised
from hadaptive_q.train.compiler import check_compiler
from hadaptive_q.train.resume import load_state, save_state
from hadaptive_q.train.schedule import learning_rate_factor, noise_factor
from hadaptive_q.train.together import join, mean, on_cpu

log = logging.getLogger(__name__)
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
MAX_GRADIENT_NORM = 5.0
SCALAR_RATE = 0.1


@dataclass(frozen=True)
class Training:
    """What one training needs besides the model: the settings, a seed and where an interrupted state is kept.

    `loss(model, inputs, labels)` replaces cross entropy, and `beside` is a network it needs on the same device;
    `on_epoch(model, epoch)` runs before every epoch. Loss,
    learning rate and norm of the gradient of every step go to TensorBoard in the folder `tensorboard`, as run `title`.
    """

    config: TrainConfig
    seed: int
    title: str
    state_file: Path | None = None
    key: str = ""
    loss: Loss | None = None
    beside: nn.Module | None = None
    on_epoch: Callable[[nn.Module, int], None] | None = None
    tensorboard: Path | None = None


def train(model: nn.Module, data: ImageData, training: Training) -> nn.Module:
    """Train `model` in place on `data.train` and return it, with averaged weights where `ema` is set.

    AdamW, linear warm-up, cosine decay; norms, biases and vectors are not decayed, scalars move at a tenth.
    A step takes `accumulate` batches, or all there are. Raises UserError where processes cannot share a batch equally.
    """
    config = training.config
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    batch_size = _shared(min(config.batch_size, len(data.train)), config.batch_size)
    accelerator = _accelerator(config.precision, training.tensorboard)
    # Set after Accelerator, which may touch the global generator.
    torch.manual_seed(training.seed)
    batches = len(data.train) // batch_size
    group = min(config.accumulate, batches)
    steps_an_epoch = batches // group
    steps = steps_an_epoch * config.epochs
    augment = Augment(config.augment, data.preprocess, data.mirror)
    mix = Mix(config.augment, data.num_classes)
    optimizer = torch.optim.AdamW(_parameter_groups(model, config), lr=config.lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps, config.warmup)
    )
    average = {n: p.detach().clone() for n, p in model.named_parameters()} if config.ema else {}
    first = _restore(model, optimizer, scheduler, average, training)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    if config.compile:
        check_compiler(accelerator.device)
        wrapped.compile()
    average = {name: tensor.to(accelerator.device) for name, tensor in average.items()}
    if training.beside:
        training.beside.to(accelerator.device)
    # An interrupted epoch runs again: what it logged the first time goes.
    purge = {"tensorboard": {"purge_step": first * steps_an_epoch}}
    accelerator.init_trackers(training.title, init_kwargs=purge)
    loss_of = training.loss or _cross_entropy(config.label_smoothing)
    with synchronised(model), _progress(training.title, steps, first * steps_an_epoch) as advance:
        for epoch in range(first, config.epochs):
            if training.on_epoch:
                training.on_epoch(model, epoch)
            torch.manual_seed(training.seed * 100_003 + epoch)
            draw = Draw(training.seed, epoch, config.augment.least_area)
            loader = training_batches(data.train, batch_size, draw)
            for step in range(epoch * steps_an_epoch, (epoch + 1) * steps_an_epoch):
                _set_noise(model, noise_factor(step, steps, config.noise_until))
                loss = torch.zeros((), device=accelerator.device)
                for left in reversed(range(group)):
                    images, labels = next(loader)
                    inputs, labels = mix(augment(images.to(accelerator.device)), labels.to(accelerator.device))
                    if config.channels_last:
                        inputs = inputs.contiguous(memory_format=torch.channels_last)
                    # Gradients are averaged over the processes once a step.
                    with accelerator.no_sync(wrapped) if left else nullcontext():
                        with accelerator.autocast():
                            part = loss_of(wrapped, inputs, labels) / group
                        accelerator.backward(part)
                    loss += part.detach()
                loss = mean(loss)
                if not torch.isfinite(loss):
                    raise FloatingPointError(f"{training.title}: loss is {loss.item()} in epoch {epoch + 1}")
                accelerator.unscale_gradients()
                _step_temperatures(model)
                norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
                if training.tensorboard:
                    figures = {
                        "loss": loss.item(),
                        "learning_rate": optimizer.param_groups[0]["lr"],
                        "gradient_norm": float(norm),
                    }
                    accelerator.log(figures, step=step)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                _update_average(average, model, config.ema)
                advance(loss.item())
            if training.state_file and accelerator.is_main_process:
                state = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scheduler": {"last_epoch": scheduler.last_epoch},
                    "average": average,
                    "epoch": epoch + 1,
                }
                save_state(training.state_file, training.key, state)
    # Not `end_training`: it parts the processes, too.
    for tracker in accelerator.trackers:
        tracker.finish()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in average:
                parameter.copy_(average[name])
    _unprepare(model)
    if training.beside:
        training.beside.cpu()
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return model.cpu()


def _unprepare(model: nn.Module) -> None:
    """Undo what Accelerator did to the model itself.

    In mixed precision it hangs an autocasting `forward` on the instance: traced later, it would hide the network
    in an autocast region, and recompiled later, a graph would go on running the old code.
    """
    for name in ("forward", "_original_forward", "_is_accelerate_prepared", "_compiled_call_impl"):
        model.__dict__.pop(name, None)


def discard_state(training: Training) -> None:
    """Remove the interrupted state once its result is safely written."""
    if training.state_file:
        training.state_file.unlink(missing_ok=True)


@torch.no_grad()
def predict(
    model: Callable[[Tensor], Tensor], split: Split, preprocess: Preprocess, batch_size: int = 128
) -> tuple[Tensor, Tensor]:
    """Return logits `(N, classes)` and labels `(N,)` over a whole split; the caller sets eval mode."""
    logits, labels = [], []
    for images, label in batches_of(split, batch_size):
        logits.append(model(normalise(images, preprocess)))
        labels.append(label)
    return torch.cat(logits), torch.cat(labels)


def _shared(batch_size: int, wanted: int) -> int:
    """Return `batch_size`, or a little less, so that every process has as many images of a batch."""
    count = processes.count()
    if wanted % count or batch_size < count:
        raise UserError(
            "batch_size", f"{batch_size} images on {count} processes", f"a multiple of {count} that the data holds"
        )
    return batch_size - batch_size % count


def _cross_entropy(label_smoothing: float) -> Loss:
    def loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(inputs), labels, label_smoothing=label_smoothing)

    return loss


def check_tensorboard(folder: Path | None) -> None:
    """Raise UserError where `folder` asks for TensorBoard and it is not installed."""
    if folder:
        require("--tensorboard", "tensorboard", ["tensorboard"])


def _accelerator(precision: str, tensorboard: Path | None) -> Accelerator:
    join()
    AcceleratorState._reset_state()  # the precision of an earlier training in this process would stick
    log_with = "tensorboard" if tensorboard else None
    # Scales stop to be learned in the middle of a training: their gradients are then missing.
    parallel = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    return Accelerator(
        cpu=on_cpu(),
        mixed_precision=_precision(precision),
        log_with=log_with,
        project_dir=tensorboard,
        kwargs_handlers=[parallel],
    )


def _precision(name: str) -> str:
    if name == "auto":
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
    return "no" if name == "float32" else name


def _parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, object]]:
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    # DySoft's slope and learned scales: one number stands for a whole tensor or row, and Adam moves it as fast as any
    # weight. At the full rate the slopes ran to zero in the first epochs, and with them the products.
    slow = {p for name, p in trained if p.numel() == 1 or name.endswith(".scale")}
    fast = [p for _, p in trained if p not in slow]
    return [
        {"params": [p for p in fast if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in fast if p.dim() <= 1], "weight_decay": 0.0},
        {"params": [p for _, p in trained if p in slow], "weight_decay": 0.0, "lr": config.lr * SCALAR_RATE},
    ]


def _set_noise(model: nn.Module, factor: float) -> None:
    for module in model.modules():
        if isinstance(module, ACH):
            module.noise.fill_(factor)


def _step_temperatures(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, ChannelScorer):
            module.step_temperature()


@torch.no_grad()
def _update_average(average: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    if average:
        for name, parameter in model.named_parameters():
            average[name].lerp_(parameter, 1 - decay)


def _restore(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
    average: dict[str, Tensor],
    training: Training,
) -> int:
    state = load_state(training.state_file, training.key) if training.state_file else None
    if state is None:
        return 0
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.last_epoch = state["scheduler"]["last_epoch"]
    scheduler._step_count = scheduler.last_epoch + 1
    average.update(state["average"])
    return int(state["epoch"])


class _progress:
    """A progress bar on standard error with the loss beside it, for those who listen to notes."""

    def __init__(self, title: str, steps: int, done: int) -> None:
        columns = (
            TextColumn(title),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        silent = not log.isEnabledFor(logging.INFO)
        self.bar = Progress(*columns, console=Console(stderr=True), disable=silent)
        self.task = self.bar.add_task(title, total=steps, completed=done, loss=float("nan"))

    def __enter__(self) -> Callable[[float], None]:
        self.bar.start()
        return lambda loss: self.bar.update(self.task, advance=1, loss=loss)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
