"""A run is shared as it is: what comes back answers every command."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from torch import Tensor

import hadaptive_q
from hadaptive_q import share
from hadaptive_q.errors import UserError
from hadaptive_q.models.checkpoint import load_model
from hadaptive_q.report.record import read_report
from hadaptive_q.restore import open_run
from hadaptive_q.share import from_pretrained, pull, push_to_hub, save_pretrained
from hadaptive_q.verify import verify


@pytest.fixture(scope="module")
def shared(nano_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `nano_run` is shared as; to be read only."""
    folder = tmp_path_factory.mktemp("shared") / "flowers"
    save_pretrained(nano_run.folder, folder)
    return folder


class Hub:
    """Stands for the hub: repositories are folders."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[tuple[str, ...]] = []

    def create_repo(self, name: str, private: bool, exist_ok: bool) -> str:
        (self.root / name).mkdir(parents=True, exist_ok=exist_ok)
        self.asked.append(("create", name, str(private)))
        return f"https://hub/{name}"

    def upload_folder(self, repo_id: str, folder_path: Path, revision: str | None, commit_message: str) -> None:
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        self.asked.append(("upload", repo_id, str(revision)))

    def download(self, name: str, revision: str | None, allow_patterns: list[str]) -> str:
        folder = self.root / f"{name} of {revision}"
        folder.mkdir(parents=True)
        for pattern in allow_patterns:
            if (self.root / name / pattern).is_file():
                shutil.copy(self.root / name / pattern, folder)
        return str(folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(share, "HfApi", lambda: hub)
    monkeypatch.setattr(share, "snapshot_download", hub.download)
    return hub


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_is_shared_is_the_run_and_a_card(shared: Path, nano_run: Any) -> None:
    assert names(shared) == names(nano_run.folder) | {"README.md"}
    assert not any(verdict["problems"] for verdict in verify(shared))


def test_the_card_says_what_was_measured(shared: Path) -> None:
    card = ModelCard.load(shared / "README.md")
    report = read_report(shared)
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {
        "accuracy": round(report.accuracy.pte_top1, 2),
        "top_5_accuracy": round(report.accuracy.pte_top5, 2),
    }
    assert card.data.library_name == "executorch"
    assert card.data.model_name == "hadaptive_net_nano-int8_ptq"
    for text in (f"{report.accuracy.pte_top1:.2f} ", f"{report.size.pte_bytes / 1e6:.3f} MB", "pull flowers --out"):
        assert text in card.content
    assert "model.onnx" not in card.content, "there is none"


def test_a_run_travels_to_the_hub_and_back(hub: Hub, nano_run: Any, tmp_path: Path, inputs: Tensor) -> None:
    assert push_to_hub(nano_run.folder, "me/flowers", private=True) == "https://hub/me/flowers"
    assert hub.asked == [("create", "me/flowers", "True"), ("upload", "me/flowers", "None")]
    assert 'from_pretrained("me/flowers")' in (hub.root / "me/flowers/README.md").read_text()

    out = tmp_path / "pulled"
    (out / "kept").mkdir(parents=True)
    (out / "report.json").touch()
    (out / "model.onnx").touch()  # of an earlier run
    pull("me/flowers", out)
    assert names(out) == names(nano_run.folder) | {"kept"}
    for name in ("model.pte", "report.json"):
        assert (out / name).read_bytes() == (nano_run.folder / name).read_bytes()
    with torch.no_grad():
        assert torch.equal(open_run(out).program().graph(inputs), nano_run.program.graph(inputs))
        network = hadaptive_q.from_pretrained("me/flowers", revision="main")
        assert torch.equal(network(inputs), load_model(nano_run.folder / "float.safetensors")(inputs))


def test_a_folder_is_as_good_as_the_hub(shared: Path, tmp_path: Path, inputs: Tensor) -> None:
    pull(str(shared), tmp_path / "pulled")
    assert names(tmp_path / "pulled") == names(shared) - {"README.md"}
    with torch.no_grad():
        assert from_pretrained(str(shared))(inputs).isfinite().all()


def test_a_file_that_was_changed_is_neither_shared_nor_taken(shared: Path, tmp_path: Path, hub: Hub) -> None:
    changed, out = tmp_path / "changed", tmp_path / "out"
    shutil.copytree(shared, changed)
    content = bytearray((changed / "model.pte").read_bytes())
    content[-1] ^= 1
    (changed / "model.pte").write_bytes(content)
    for attempt in (lambda: pull(str(changed), out), lambda: push_to_hub(changed, "me/flowers")):
        with pytest.raises(UserError, match=r"model\.pte: got its bytes are not those that were measured"):
            attempt()
    assert not out.exists()
    assert not hub.asked


@pytest.mark.parametrize("missing", share.NEEDED)
def test_a_run_that_is_not_finished(missing: str, shared: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(shared, run)
    (run / missing).unlink()
    with pytest.raises(UserError, match=f"no {missing}; expected the folder of a finished"):
        save_pretrained(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"--out .*: got a folder with other things in it"):
        pull(str(shared), tmp_path)
    assert names(tmp_path) == {"thesis.tex"}


@pytest.mark.parametrize("name", ["nobody/nothing", "two words", "a/b/c"])
def test_what_the_hub_refuses_is_one_line(name: str, tmp_path: Path) -> None:
    for attempt in (lambda: pull(name, tmp_path / "out"), lambda: from_pretrained(name)):
        with pytest.raises(UserError, match=r"expected a folder, or a repository of the hub.*hf auth login") as refused:
            attempt()
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()
