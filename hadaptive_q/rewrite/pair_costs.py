"""The measured cost of every form of the cross product, and the choice it leads to.

`pair_costs.json` is made by ``python benchmarks/pair_forms.py``: instructions on emulated cores from the chosen
channels to the codes of the norm's output, for the blocks of S, M and L at 224. It has forms that are not float-equal,
too, or cost a matrix product for copies: they stand there for the record.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("pair_costs.json")
FLOAT_EQUAL = ("rolled", "row broadcast", "one-hot float")


@functools.cache
def read_table() -> tuple[dict[str, Any], ...]:
    """Return the measured blocks: `models`, `channels`, `cs`, `height`, `width`, `instructions` by form and core."""
    return tuple(json.loads(TABLE.read_text())["blocks"])


def cheapest_form(cs: int, height: int, width: int) -> str:
    """Return the float-equal form with the fewest instructions, over all cores, at the nearest measured shape.

    Distance of shapes: ``|log(slots / slots')| + |log(pixels / pixels')|``.
    """

    def distance(block: dict[str, Any]) -> float:
        slots = cs * (cs - 1) / (block["cs"] * (block["cs"] - 1))
        return abs(math.log(slots)) + abs(math.log(height * width / (block["height"] * block["width"])))

    instructions = min(read_table(), key=distance)["instructions"]
    return min(FLOAT_EQUAL, key=lambda form: sum(instructions[form].values()))
