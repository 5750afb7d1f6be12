"""Whatever a recipe or a --set holds: a Recipe, or one line for the user."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hadaptive_q.errors import UserError
from hadaptive_q.recipe import Recipe, load_recipe, parse_recipe, read_yaml

SHIPPED = [load_recipe(name).model_dump(mode="json") for name in ("float", "int8", "int4")]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.dates()
NAMES = st.text(max_size=8)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(NAMES, inner), max_leaves=8)
KEYS = st.sampled_from(["float", "fit", "quantize", "layers", "epochs", "lr", "margin", "gap", "seed", "data", "x", ""])
FILES = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def answered(content: Any) -> Recipe | None:
    """Return the recipe, or None where it was refused as a user expects it."""
    try:
        return parse_recipe(content, "here")
    except UserError:
        return None


@given(st.dictionaries(NAMES | KEYS, VALUES, max_size=6))
def test_any_mapping_is_a_recipe_or_one_line(content: dict[str, Any]) -> None:
    answered(content)


@given(st.data())
def test_a_recipe_with_anything_in_it_is_one_or_one_line(data: st.DataObject) -> None:
    content = copy.deepcopy(data.draw(st.sampled_from(SHIPPED)))
    for _ in range(data.draw(st.integers(1, 3))):
        section = content
        key = data.draw(st.sampled_from(sorted(section)) | KEYS)
        while isinstance(section.get(key), dict) and data.draw(st.booleans()):
            section = section[key]
            key = data.draw(st.sampled_from([*section, "x"]) | KEYS)
        section[key] = data.draw(VALUES)
    answered(content)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@FILES
@given(name=TEXTS, data=TEXTS, seed=st.integers(0, 2**32 - 1), lr=st.floats(1e-300, 1e300), layer=TEXTS)
@example(name="1e5", data="1e-3", seed=0, lr=1e-3, layer="+1E9")  # texts that the loader takes for numbers
@example(name="\x85", data="\ufeff", seed=0, lr=1e-3, layer="<<")
def test_a_recipe_written_and_read_is_the_same(
    name: str, data: str, seed: int, lr: float, layer: str, tmp_path: Path
) -> None:
    content = copy.deepcopy(SHIPPED[1])
    content |= {"name": name, "data": data, "seed": seed}
    content["float"]["lr"] = lr
    content["quantize"]["layers"] = {layer: 4}
    recipe = answered(content)
    assert recipe is not None
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    again = load_recipe(str(tmp_path / "recipe.yaml"))
    assert again == recipe
    assert again.digest() == recipe.digest()


SETTING = st.builds("=".join, st.tuples(st.lists(KEYS, max_size=4).map(".".join), st.text(max_size=30))) | st.text()


@given(st.lists(SETTING, min_size=1, max_size=3))
@example(["float.lr=!!int ''"])
@example(["float.lr=!!bool x"])
@example(["float=!!map [1]"])
@example(["a" + ".a" * 3000 + "=1"])
@example(["seed=" + "9" * 5000])
@example(["float.epochs=" + "9" * 400])
def test_any_setting_is_applied_or_one_line(given_: list[str]) -> None:
    with contextlib.suppress(UserError):
        load_recipe("int8", given_)


@FILES
@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("!!set {a, b}")
@example("? !!timestamp x\n: 1")
@example("a: !!map [1]")
@example("!x y")
def test_any_text_is_a_mapping_or_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    with contextlib.suppress(UserError):
        assert isinstance(read_yaml(tmp_path / "x.yaml"), dict)


@pytest.mark.parametrize("setting", ["seed=4294967296", "image_size=4097", "image_size=100000000000000000000"])
def test_numbers_no_machine_could_use_are_refused(setting: str) -> None:
    with pytest.raises(UserError, match="less than"):
        load_recipe("int8", [setting])
