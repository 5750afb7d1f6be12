"""What a comparison is given: names, checkpoints, runs and the recipe of each."""

from __future__ import annotations

from pathlib import Path

import pytest

from hadaptive_q.candidates import find_candidates
from hadaptive_q.errors import UserError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of the right names: what is in them is looked at later."""
    monkeypatch.chdir(tmp_path)
    for name in ("a/float.safetensors", "b/model.pt", "c/trained.safetensors", "run/report.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_names_recipes_and_data(folder: Path) -> None:
    models = ["hadaptive_net_nano", "a/float.safetensors", "b/model.pt", "c/trained.safetensors", "run/"]
    found = find_candidates(models, ["int4_ptq", "a=int8", "trained=int8_ptq"], ["seed=3"], "glyphs")
    assert found.data == "glyphs"
    assert [each.name for each in found.models] == ["hadaptive_net_nano", "a", "b", "trained", "run"]
    *quantized, taken = found.models
    assert (taken.recipe, taken.checkpoint, taken.taken) == (None, None, Path("run"))
    recipes = [each.recipe for each in quantized if each.recipe]
    assert [recipe.name for recipe in recipes] == ["int4_ptq", "int8", "int4_ptq", "int8_ptq"]
    assert {(recipe.seed, recipe.data) for recipe in recipes} == {(3, "glyphs")}
    assert recipes[0].model == "hadaptive_net_nano"
    assert [each.checkpoint for each in quantized] == [None, *map(Path, models[1:4])]


def test_the_recipe_says_on_what_data() -> None:
    found = find_candidates(["starnet_s1"], [])
    assert found.data == "digits"
    assert [each.recipe and each.recipe.name for each in found.models] == ["int8"]
    found = find_candidates(["starnet_s1"], ["int8_imagenet", "starnet_s1=int8_ptq"])
    assert found.data == "hf:ILSVRC/imagenet-1k"
    assert [each.recipe and each.recipe.data for each in found.models] == [found.data]


def test_a_setting_does_not_make_all_models_one() -> None:
    found = find_candidates(["starnet_s1", "starnet_s2"], [], ["model=starnet_s4"])
    assert [each.recipe and each.recipe.model for each in found.models] == ["starnet_s1", "starnet_s2"]


@pytest.mark.parametrize(
    ("models", "recipes", "message"),
    [
        (["hadaptive_net_xs"], [], "model hadaptive_net_xs: got neither; .* 'hadaptive_net_s'"),
        (["nowhere.safetensors"], [], "a checkpoint or the folder of a run"),
        (["starnet_s1", "starnet_s1"], [], "model starnet_s1: got the name 'starnet_s1' for the second time"),
        (["a/float.safetensors", "./a"], [], "the name 'a' for the second time"),
        (["starnet_s1"], ["int9"], "--recipe int9: got an unknown recipe"),
        (["starnet_s1"], ["float"], "--recipe float: got a recipe for train; expected one for ptq or qat"),
        (["starnet_s1"], ["starnet_s1=float"], "got a recipe for train"),
        (["starnet_s1"], ["int8", "int4"], "--recipe int4: got a second recipe for all"),
        (["starnet_s1"], ["starnet_s2=int8"], "starnet_s2: got no model; .* 'starnet_s1'"),
        (["starnet_s1"], ["starnet_s1=int8", "starnet_s1=int4"], "got a second recipe for it"),
        (["starnet_s1", "run"], ["run=int8"], "run: got a finished run; expected one recipe for one of starnet_s1"),
    ],
)
def test_mistakes(folder: Path, models: list[str], recipes: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_candidates(models, recipes)
