"""Two processes that share batches of 64 end where one does; the same file is what they run."""

from __future__ import annotations

import copy
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hadaptive_q import processes
from hadaptive_q.data.datasets import ImageData, TensorSplit
from hadaptive_q.data.sources import open_data
from hadaptive_q.data.transforms import normalise
from hadaptive_q.errors import UserError
from hadaptive_q.models.families import create_model
from hadaptive_q.quant.backends import torchao_pt2e as backend
from hadaptive_q.quant.plan import make_plan
from hadaptive_q.recipe import FitConfig, QuantizeConfig, TrainConfig
from hadaptive_q.rewrite.deploy import deploy_graph
from hadaptive_q.train.loop import Training, train
from hadaptive_q.train.losses import fit_loss
from hadaptive_q.train.observe import ObservedGraph, ObservedModel
from hadaptive_q.train.together import from_first, run_folder


class Stopped(Exception):
    """What ends a training between two epochs here."""


def in_double(module: nn.Module) -> None:
    """Compute in float64: float rounding aside, what is left of a difference is a mistake."""
    module.double().register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))


def first_digits(count: int) -> ImageData:
    digits = open_data("digits", 32)
    assert isinstance(digits.train, TensorSplit)
    split = TensorSplit(digits.train.images[:count], digits.train.labels[:count], digits.train.identities[:count])
    return ImageData("digits", digits.preprocess, split, split, mirror=True)


def float_steps(data: ImageData, state: Path | None = None, epochs: int = 2) -> dict[str, Tensor]:
    """Two epochs of one step: augmentation, Gumbel noise, dropout, BatchNorm and the temperatures' rule.

    Stops after `epochs`; goes on from, and leaves, a `state`.
    """

    def stop(_: nn.Module, epoch: int) -> None:
        if epoch == epochs:
            raise Stopped

    torch.manual_seed(7)
    model = create_model("hadaptive_net_nano", 10).train()
    in_double(model)
    config = TrainConfig(epochs=2, batch_size=64, lr=0.003, precision="float32")
    train(model, data, Training(config, 1, "float", state_file=state, key="of this test", on_epoch=stop))
    return model.state_dict()


def qat_steps(data: ImageData, learned: bool, live: bool = False) -> dict[str, Tensor]:
    """One step under quantization with a teacher, and the gradients it took; in float64 where BatchNorm is `live`."""
    torch.manual_seed(7)
    teacher = create_model("hadaptive_net_nano", 10).eval()
    inputs = normalise(torch.stack([data.train[i][0] for i in range(32)]), data.preprocess)
    graph = deploy_graph(copy.deepcopy(teacher), 32)
    calibrated = backend.calibrate(backend.prepare(graph, make_plan(graph, QuantizeConfig()), "minmax"), [inputs])
    backend.start_fit(calibrated, learned, dropout=True, live=[inputs] if live else None)
    fit = FitConfig(epochs=1, batch_size=64, lr=1e-4, precision="float32", distill=0.5, distill_features=0.5)
    student, observed = ObservedGraph(calibrated.graph), ObservedModel(teacher)
    for module in (student, observed) if live else ():
        in_double(module)
    gradients: dict[str, Tensor] = {}

    def keep(*_: object) -> None:
        gradients.update(
            {f"gradient of {n}": p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
        )

    hook = register_optimizer_step_pre_hook(keep)
    train(student, data, Training(fit, 1, "qat", loss=fit_loss(fit, observed), beside=teacher))
    hook.remove()
    return {**student.state_dict(), **gradients}


def take_part(folder: Path) -> None:
    """What every process does: train, and keep the results; then hold one folder together."""
    data = first_digits(64)
    results = {"float": float_steps(data), "follow": qat_steps(data, False), "learn": qat_steps(data, True)}
    results |= {f"live, {kind}": qat_steps(data, kind == "learn", live=True) for kind in ("follow", "learn")}
    left = folder / "left.state"
    if processes.count() > 1:
        with run_folder(folder / "stopped", ["float.state"]) as own:
            with pytest.raises(Stopped):
                float_steps(data, own / "float.state", epochs=1)
            assert (own / "float.state").exists() == (processes.index() == 0)
            if processes.index() == 0:
                shutil.copy(own / "float.state", left)
        with run_folder(folder / "stopped", ["float.state"]) as own:
            results["resumed"] = float_steps(data, own / "float.state")
    else:
        results["resumed"] = float_steps(data, left)
    torch.save(results, folder / f"{processes.index()}-of-{processes.count()}.pt")
    if processes.count() == 1:
        return
    run = folder / "run"
    with run_folder(run, ["float.state", "missing"]) as own:
        assert (own == run) == (processes.index() == 0)
        assert (own / "float.state").read_bytes() == b"of an interrupted run"
        assert [path.name for path in own.iterdir() if path.name != ".lock"] == ["float.state"]
        assert from_first(lambda: processes.index()) == 0
        (own / f"of-{processes.index()}").touch()
    with pytest.raises(UserError, match="no room"):
        from_first(_complain)


def _complain() -> None:
    raise UserError("disk", "no room", "some")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What one process ended with, and each of two."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "run").mkdir()
    (folder / "run" / "float.state").write_bytes(b"of an interrupted run")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env={**common, "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    for process in started:
        _, said = process.communicate(timeout=600)
        assert process.returncode == 0, said
    take_part(folder)
    assert sorted(path.name for path in (folder / "run").iterdir()) == ["float.state", "of-0"]
    return [torch.load(folder / name) for name in ("0-of-1.pt", "0-of-2.pt", "1-of-2.pt")]


@pytest.mark.parametrize("kind", ["float", "follow", "learn", "live, follow", "live, learn", "resumed"])
def test_both_processes_end_with_the_same(kind: str, results: list[dict[str, Any]]) -> None:
    _, one, other = (result[kind] for result in results)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name].nan_to_num(-1), other[name].nan_to_num(-1))] == []


def test_two_float_steps_of_two_processes_are_those_of_one(results: list[dict[str, Any]]) -> None:
    alone, shared, _ = (result["float"] for result in results)
    assert alone["head.classifier.weight"].dtype == torch.float64
    for name, wanted in alone.items():
        torch.testing.assert_close(shared[name], wanted, rtol=1e-5, atol=1e-5, equal_nan=True, msg=name)
    assert alone["blocks.2.expansion.scorer.tau"] < 4.0 or not alone["blocks.2.expansion.scorer.gradient_norm"].isnan()


@pytest.mark.parametrize("kind", ["follow", "learn"])
def test_ranges_of_two_processes_are_those_of_one(kind: str, results: list[dict[str, Any]]) -> None:
    alone, shared, _ = (result[kind] for result in results)
    assert alone.keys() == shared.keys()
    ranges = [name for name in alone if name.endswith((".low", ".high"))]
    assert len(ranges) > 20
    for name in ranges:
        torch.testing.assert_close(shared[name], alone[name], rtol=1e-4, atol=1e-5, msg=name)


def test_an_interrupted_training_of_two_processes_ends_where_it_would_have(results: list[dict[str, Any]]) -> None:
    """The second process has nothing on its disk; it goes on from what the first one kept."""
    for one in results[1:]:
        whole, resumed = one["float"], one["resumed"]
        assert whole.keys() == resumed.keys()
        assert [n for n in whole if not torch.equal(whole[n].nan_to_num(-1), resumed[n].nan_to_num(-1))] == []


def test_one_process_goes_on_with_what_two_began(results: list[dict[str, Any]]) -> None:
    for name, wanted in results[0]["float"].items():
        found = results[0]["resumed"][name]
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, equal_nan=True, msg=name)


def gradient_error(kind: str, results: list[dict[str, Any]]) -> float:
    """Return how far the gradient of two processes is from that of one, over its length."""
    one, other = (
        torch.cat([tensor.flatten() for name, tensor in result[kind].items() if name.startswith("gradient of")])
        for result in results[:2]
    )
    return float((one - other).norm() / one.norm())


def test_a_step_under_quantization_of_two_processes_is_that_of_one(results: list[dict[str, Any]]) -> None:
    """In float32 with BatchNorm folded: live, its float roundings move values by whole codes, gradients with them."""
    assert gradient_error("learn", results) <= 1e-5


@pytest.mark.parametrize("kind", ["live, follow", "live, learn"])
def test_a_step_with_live_batch_norm_of_two_processes_is_that_of_one(kind: str, results: list[dict[str, Any]]) -> None:
    """In float64, whose roundings move no code: batch statistics, following ranges and learned scales are shared."""
    assert any("live_batch_norm" in name for name in results[0][kind])
    assert gradient_error(kind, results) <= 1e-10


def test_a_batch_that_processes_cannot_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "3", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"batch_size: got 64 images on 3 processes; expected a multiple of 3"):
        train(nn.Identity(), first_digits(64), Training(TrainConfig(epochs=1, batch_size=64, lr=1e-3), 0, "test"))


if __name__ == "__main__":
    take_part(Path(sys.argv[1]))
