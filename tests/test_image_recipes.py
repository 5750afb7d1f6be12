"""Every shipped recipe for a data set from elsewhere, end to end on a few images in that data set's layout."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hadaptive_q.evaluate import evaluate_file, evaluate_written
from hadaptive_q.models.checkpoint import load_model
from hadaptive_q.pipeline import quantize, train_float
from hadaptive_q.recipe import Recipe, load_recipe, shipped
from hadaptive_q.report.passport import read_passport
from hadaptive_q.train import loop
from hadaptive_q.train.resume import save_state
from hadaptive_q.verify import verify

RECIPES = {name: load_recipe(name) for name in shipped("recipes") if load_recipe(name).data != "digits"}
QUANTIZING = [name for name, recipe in RECIPES.items() if recipe.task != "train"]
CLASSES = ["n01440764", "n01443537", "n02096294"]


def jpeg(index: int, width: int, height: int) -> bytes:
    """A photograph of noise whose colour says its class."""
    pixels = np.random.default_rng(index).integers(0, 120, (height, width, 3), dtype=np.uint8)
    pixels[..., index % 3] += 120
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def cifar100(folder: Path) -> str:
    """The hub's layout: PNG of 32 x 32, two columns of labels."""
    names = {"fine_label": ["apple", "bear", "crab"], "coarse_label": ["fruit", "animal"]}
    features = datasets.Features(
        {"img": datasets.Image(), **{name: datasets.ClassLabel(names=names[name]) for name in names}}
    )
    for split, count in (("train", 24), ("test", 6)):
        images = [{"bytes": jpeg(i, 32, 32), "path": None} for i in range(count)]
        labels = [i % 3 for i in range(count)]
        columns = {"img": images, "fine_label": labels, "coarse_label": [min(1, label) for label in labels]}
        table = datasets.Dataset.from_dict(columns, features=features)
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return f"hf:{folder}#fine_label"


def imagenet(folder: Path) -> str:
    """The layout of the archives, unpacked: `train/n01440764/n01440764_10026.JPEG`, landscapes and portraits."""
    for split, count in (("train", 24), ("val", 6)):
        for index in range(count):
            name = CLASSES[index % 3]
            path = folder / split / name / f"{name}_{index}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(index, *((100, 75) if index % 2 else (75, 100))))
    return str(folder)


STAND_INS: dict[str, Callable[[Path], str]] = {
    "hf:uoft-cs/cifar100#fine_label": cifar100,
    "hf:ILSVRC/imagenet-1k": imagenet,
}


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    made = {data: make(tmp_path_factory.mktemp("data")) for data, make in STAND_INS.items()}
    return lambda data: made[data]


def small(name: str, data: str, **settings: object) -> Recipe:
    """Return a shipped recipe at a size for tests: nano network, 32x32, one epoch of six steps."""
    fields = {"model": "hadaptive_net_nano", "image_size": 32, "float.epochs": 1, "float.batch_size": 4, **settings}
    fields |= {"data": f"'{data}'"}
    if RECIPES[name].fit:
        fields |= {"fit.epochs": 1, "fit.batch_size": 4}
    return load_recipe(name, [f"{key}={value}" for key, value in fields.items()])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(folder / "float.safetensors").state_dict()


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains(name: str, stand_in: Callable[[str], str], tmp_path: Path) -> None:
    recipe = small(name, stand_in(RECIPES[name].data))
    data, model = train_float(recipe, tmp_path)
    assert (len(data.train), len(data.val), model.logits.shape) == (24, 6, (6, 3))
    assert model.logits.isfinite().all()
    assert model.labels.tolist() in ([0, 1, 2, 0, 1, 2], [0, 0, 1, 1, 2, 2])
    preprocess = json.loads((tmp_path / "float.json").read_text())["preprocess"]
    assert preprocess.get("crop") == recipe.crop == (0.875 if "imagenet" in name else None)
    # What the checkpoint says is how it is evaluated.
    top1 = 100 * float((model.logits.argmax(1) == model.labels).float().mean())
    assert evaluate_file(tmp_path / "float.safetensors", recipe.data)["top1"] == pytest.approx(top1)


@pytest.mark.parametrize("name", ["train_cifar100", "train_imagenet_strong"])
def test_the_number_of_workers_changes_no_weight(name: str, stand_in: Callable[[str], str], tmp_path: Path) -> None:
    found = []
    for workers in (0, 1, 2):
        recipe = small(name, stand_in(RECIPES[name].data), workers=workers)
        assert recipe.workers == workers
        train_float(recipe, tmp_path / str(workers))
        found.append(weights(tmp_path / str(workers)))
    assert all(torch.equal(found[0][key], other[key]) for other in found[1:] for key in found[0])


def test_a_stream_goes_on_from_its_last_epoch(
    stand_in: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = stand_in(RECIPES["train_cifar100"].data).replace("hf:", "hf-stream:")
    recipe = small("train_cifar100", data, **{"float.epochs": 3})
    train_float(recipe, tmp_path / "whole")

    def killed_after(*arguments: Any) -> None:
        save_state(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_state", killed_after)
        with pytest.raises(KeyboardInterrupt):
            train_float(recipe, tmp_path / "killed")
    assert not (tmp_path / "killed" / "float.safetensors").exists()
    train_float(recipe, tmp_path / "killed")
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[key], killed[key]) for key in whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", QUANTIZING)
def test_recipe_gives_a_measured_file(name: str, stand_in: Callable[[str], str], tmp_path: Path) -> None:
    recipe = small(name, stand_in(RECIPES[name].data))
    report = quantize(recipe, tmp_path)
    assert report.parity.integer_identical == 1.0
    assert report.accuracy.samples == 6
    # The crop of the evaluation travels with the file.
    assert read_passport(tmp_path / "model.pte").preprocess.crop == recipe.crop == 0.875
    assert evaluate_written(str(tmp_path / "model.pte"), recipe.data)["top1"] == report.accuracy.pte_top1
    assert not any(verdict["problems"] for verdict in verify(tmp_path / "model.pte"))
