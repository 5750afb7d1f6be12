"""Every shipped recipe parses; every mistake in one is answered with its place and what was expected there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hadaptive_q.errors import UserError
from hadaptive_q.recipe import load_recipe, parse_recipe, read_yaml, shipped

MINIMAL = "task: train\nfloat: {epochs: 2, lr: 0.01}\n"


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", shipped("recipes"))
def test_shipped_recipe_parses(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    # Self-contained: what it resolves to, written out and read back, is the same recipe.
    again = load_recipe(written(tmp_path, recipe.to_yaml()))
    assert again == recipe
    assert again.digest() == recipe.digest()


@pytest.mark.parametrize("name", shipped("recipes"))
def test_shipped_recipe_says_what_it_is_for_and_how_it_runs(name: str) -> None:
    purpose, command, *_ = shipped("recipes")[name].read_text().splitlines()
    assert re.fullmatch(r"# \w.*\.", purpose)
    assert command.startswith(f"# hadaptive-q {load_recipe(name).task} ")


def test_recipes_ship_at_all() -> None:
    assert {"float", "int8", "int8_ptq"} <= set(shipped("recipes"))


def test_a_recipe_file_is_named_after_itself_and_filled_with_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, MINIMAL))
    assert (recipe.name, recipe.task, recipe.model, recipe.fit) == ("mine", "train", "hadaptive_net_s", None)
    assert (recipe.float.epochs, recipe.float.lr, recipe.float.batch_size) == (2, 0.01, 64)


def test_digest_ignores_comments_and_order_and_nothing_else(tmp_path: Path) -> None:
    digest = load_recipe(written(tmp_path, MINIMAL)).digest()
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", digest)
    turned = "# a comment\nfloat:\n  lr: 1.0e-2  # another\n  epochs: 2\ntask: train\n"
    assert load_recipe(written(tmp_path, turned)).digest() == digest
    explicit = MINIMAL + "model: hadaptive_net_s\n"  # a default spelt out changes nothing
    assert load_recipe(written(tmp_path, explicit)).digest() == digest
    assert load_recipe(written(tmp_path, MINIMAL), ["float.lr=0.02"]).digest() != digest
    assert load_recipe(written(tmp_path, MINIMAL), ["float.augment.mirror=false"]).digest() != digest


def test_a_recipe_cannot_be_changed() -> None:
    recipe = load_recipe("int8")
    with pytest.raises(ValueError, match="frozen"):
        recipe.float.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["float.epochs=3"], {"epochs": 3}),
        (["float.epochs=3", "float.epochs=4"], {"epochs": 4}),
        (["float.lr=1e-3"], {"lr": 1e-3}),  # YAML 1.1 alone takes this for text
        (["float.lr=5E-4"], {"lr": 5e-4}),
        (["float.lr=1"], {"lr": 1.0}),
        (["float.precision=float32"], {"precision": "float32"}),
        (["float={epochs: 1, lr: 0.5}"], {"epochs": 1, "lr": 0.5}),
    ],
    ids=str,
)
def test_settings_are_applied_in_order(settings: list[str], expected: dict[str, object]) -> None:
    section = load_recipe("float", settings).float
    assert {key: getattr(section, key) for key in expected} == expected


def test_settings_reach_what_the_file_leaves_out() -> None:
    recipe = load_recipe("float", ["float.augment.degrees=0", "image_size=96", "name=other"])
    assert (recipe.float.augment.degrees, recipe.image_size, recipe.name) == (0.0, 96, "other")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("float.epochs", "--set float.epochs: got no '='; expected key=value"),
        ("=3", "--set =3: got "),
        ("task.deeper=1", "--set task.deeper=1: got 'task', which is a single value; expected a section"),
        ("float.lr=[1", "--set float.lr=[1: got '[1'; expected a plain YAML value"),
        ("float.lr=*a", "expected a plain YAML value"),
        ("float.lr=2020-13-45", "expected a plain YAML value"),  # looks like a date, is none
        ("float.lr=" + "[" * 2000, "expected a plain YAML value"),
        ("float.epoch=3", "float.yaml, float.epoch: got an unknown key; expected one of epochs, batch_size"),
        ("float.epoch=3", "did you mean 'epochs'?"),
        ("float.augment.degree=3", "float.augment.degree: got an unknown key; expected one of degrees"),
        ("quantise.observer=mse", "quantise: got an unknown key"),
        ("quantise.observer=mse", "did you mean 'quantize'?"),
        ("float.epochs=many", "float.epochs: got 'many'; expected a valid integer"),
        ("float.epochs=2.5", "float.epochs: got 2.5; expected a valid integer"),
        ("float.epochs=true", "float.epochs: got True; expected a valid integer"),
        ("float.epochs=0", "float.epochs: got 0; expected greater than 0"),
        ("float.epochs=", "float.epochs: got None; expected a valid integer"),
        ("float.lr='0.1'", "float.lr: got '0.1'; expected a valid number"),
        ("float.lr=.nan", "float.lr: got"),
        ("float.lr=.inf", "float.lr: got"),
        ("float.warmup=1", "float.warmup: got 1; expected less than 1"),
        ("float.label_smoothing=-0.1", "expected greater than or equal to 0"),
        ("float.precision=fp8", "float.precision: got 'fp8'; expected 'auto', 'float32', 'bf16' or 'fp16'"),
        (
            "quantize.observer=median",
            "quantize.observer: got 'median'; expected 'minmax', 'mse', 'histogram' or 'product'",
        ),
        ("quantize.backend=brevita", "quantize.backend: got 'brevita'; expected 'torchao' or 'brevitas'"),
        ("quantize.weight_bits=1", "quantize.weight_bits: got 1; expected greater than or equal to 2"),
        ("quantize.pointwise_weight_bits=9", "quantize.pointwise_weight_bits: got 9; expected less than or equal to 8"),
        ("quantize.activation_bits=6", "quantize.activation_bits: got 6; expected 4 or 8"),
        ("quantize.layers={head: 9}", "quantize.layers.head: got 9; expected less than or equal to 8"),
        ("quantize.layers.head.hidden=1", "quantize.layers.head.hidden: got 1; expected greater than or equal to 2"),
        ("quantize.rounding=up", "quantize.rounding: got 'up'; expected 'nearest' or 'gptq'"),
        ("quantize.layers=4", "quantize.layers: got 4; expected "),
        ("seed=-1", "seed: got -1; expected greater than or equal to 0"),
        ("data=7", "data: got 7; expected a valid string"),
        ("data=2020-01-01", "expected numbers, texts, lists and mappings"),
        ("float=fast", "float: got 'fast'; expected "),
        ("float={lr: 1.0}", "float.epochs: got nothing; expected field required"),
        ("model=hadaptive_net_x", "model: got 'hadaptive_net_x'; expected one of hadaptive_net_nano"),
        ("model=hadaptive_net_x", "did you mean 'hadaptive_net_"),
        ("task=qat", "task: got 'qat'; expected 'fit' with task: qat, and only there"),
        ("fit={epochs: 1, lr: 0.1}", "task: got 'train'; expected 'fit' with task: qat, and only there"),
        ("fit.epochs=1", "fit.lr: got nothing; expected field required"),
        ("fit={epochs: 1, lr: 0.1, distil: 1}", "did you mean 'distill'?"),
    ],
    ids=lambda value: value[:40],
)
def test_a_wrong_setting_is_explained(setting: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("float", [setting])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("int9", "--recipe int9: got an unknown recipe; expected one of float, int4"),
        ("int9", "did you mean 'int8'?"),
        ("", "got an unknown recipe"),
        ("nowhere/mine.yaml", "--recipe nowhere/mine.yaml: got no such file; expected a recipe file"),
    ],
)
def test_an_unknown_recipe_is_answered_with_the_known_ones(name: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(name)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "task: ptq\n", "duplicate key 'task'"),
        ("task: train\nfloat: {epochs: 2, lr: 0.01, epochs: 3}\n", "duplicate key 'epochs'"),
        ("a: &x [1]\nb: *x\n", "aliases are not allowed"),
        ("<<: {task: train}\n", "expected plain YAML"),
        ("- task\n", "got list; expected a mapping"),
        ("train", "got str; expected a mapping"),
        ("", "got NoneType; expected a mapping"),
        ("task: [train\n", "expected plain YAML"),
        ("---\na: 1\n---\nb: 2\n", "expected plain YAML"),
        ("task: !!python/object/apply:os.getcwd []\n", "expected plain YAML"),
        ("? [a, b]\n: 1\n", "expected plain YAML"),
        ("seed: 0b_\n", "expected plain YAML"),
        ("a: " + "[" * 5000, "expected plain YAML"),
    ],
    ids=lambda value: value[:40],
)
def test_what_is_not_plain_yaml_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(path)
    assert message in str(caught.value)


def test_an_alias_bomb_is_refused_at_its_first_alias(tmp_path: Path) -> None:
    levels = "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 10))
    with pytest.raises(UserError, match="aliases are not allowed"):
        load_recipe(written(tmp_path, "l0: &l0 [x]\n" + levels))


def test_bytes_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"task: \xff\xfe\n")
    with pytest.raises(UserError, match="expected plain YAML"):
        read_yaml(path)


def test_text_in_other_languages_passes(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, MINIMAL + "name: Prüfung 試験\ndata: ./изображения\n"))
    assert (recipe.name, recipe.data) == ("Prüfung 試験", "./изображения")


def test_parse_recipe_names_its_source() -> None:
    with pytest.raises(UserError, match=r"^report\.json, task: got 'bake'; expected 'train', 'ptq' or 'qat'$"):
        parse_recipe({"name": "x", "task": "bake", "float": {"epochs": 1, "lr": 0.1}}, "report.json")


def test_a_layer_is_set_by_its_dotted_name(tmp_path: Path) -> None:
    recipe = load_recipe("int4_ptq", ["quantize.layers.head.hidden=8", "quantize.layers.tail=4"])
    assert recipe.quantize.layers == {"head.hidden": 8, "tail": 4}
    assert recipe == load_recipe("int4_ptq", ["quantize.layers={tail: 4, head.hidden: 8}"])
    assert recipe.digest() == load_recipe("int4_ptq", ["quantize.layers={tail: 4, head.hidden: 8}"]).digest()
    assert recipe.digest() != load_recipe("int4_ptq").digest()
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert load_recipe(str(tmp_path / "again.yaml")) == recipe
