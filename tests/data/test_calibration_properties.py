"""Whatever a manifest holds: samples of this very data, or one line for the user."""

from __future__ import annotations

from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from hadaptive_q.data.calibration import Manifest, resolve
from hadaptive_q.data.datasets import ImageData
from hadaptive_q.errors import UserError

NUMBERS = st.integers() | st.none() | st.integers(-3, 200)
CONTENT = st.fixed_dictionaries(
    {"source": st.just("digits") | st.text(max_size=5)},
    optional={
        "split": st.sampled_from(["train", "val", "test"]),
        "count": NUMBERS,
        "seed": NUMBERS,
        "indices": st.none() | st.lists(st.integers(-2, 120) | st.integers(), max_size=5),
        "digest": st.none() | st.text(max_size=5),
    },
)


@given(content=CONTENT)
@example(content={"source": "digits", "indices": [2**63]})
@example(content={"source": "digits", "indices": [-1]})
@example(content={"source": "digits", "count": 2**80, "seed": 2**80})
def test_any_manifest_names_samples_that_exist(few_digits: ImageData, content: dict[str, Any]) -> None:
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError:
        return
    try:
        resolved = resolve(manifest, few_digits)
    except UserError:
        return
    assert resolved.indices is not None
    assert all(0 <= index < len(few_digits.train) for index in resolved.indices)
    assert resolve(resolved, few_digits) == resolved
