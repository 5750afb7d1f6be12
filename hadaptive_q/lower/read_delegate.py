"""Read the XNNPACK delegates of a written `.pte`, whoever wrote it: its operators, and the types of what they read.

The reader that comes with ExecuTorch gives names, types and places as they are; of scales it prints six decimals.
"""

from __future__ import annotations

import importlib.resources
import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from executorch.backends.xnnpack import serialization
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
from executorch.exir._serialize._flatbuffer import _flatc_decompile
from executorch.exir._serialize._program import deserialize_pte_binary

_BACKEND = "XnnpackBackend"
_TYPE_PREFIX = "xnn_datatype_"
# The bound of a clamp without one, as the reader writes it: no JSON. Names stand in quotes.
_INFINITE = re.compile(rb"(: -?)inf\b")


@dataclass(frozen=True)
class ReadOperator:
    """One operator: `kind` is its name in the schema, such as ``XNNFullyConnected``; `types` of its inputs by place,
    such as ``{"input1": "qint8", "filter": "qcint4"}``."""

    kind: str
    types: dict[str, str]


def read_operators(pte: bytes) -> list[ReadOperator]:
    """Return the operators of every XNNPACK delegate of the file `pte`, in order of execution."""
    program = deserialize_pte_binary(pte).program
    places = [d.processed.index for plan in program.execution_plan for d in plan.delegates if d.id == _BACKEND]
    return [each for place in places for each in _operators(bytes(program.backend_delegate_data[place].data))]


def _operators(payload: bytes) -> Iterator[ReadOperator]:
    graph = _decoded(payload)
    types: dict[int, str] = {}
    for value in graph["xvalues"]:
        tensor = value["xvalue_union"].get("tensor_value", value["xvalue_union"])
        types[tensor["id_out"]] = tensor["datatype"].removeprefix(_TYPE_PREFIX)
    for node in graph["xnodes"]:
        places = {name.removesuffix("_id"): i for name, i in node["xnode_union"].items() if name.endswith("_id")}
        read = {name: types[i] for name, i in places.items() if i in types and not name.startswith("output")}
        yield ReadOperator(node["xnode_union_type"].lstrip("_"), read)


def _decoded(payload: bytes) -> Any:
    header = payload[: XNNHeader.EXPECTED_LENGTH]
    # Files of early versions are a flatbuffer without a header before it.
    if header[XNNHeader.MAGIC_OFFSET] == XNNHeader.EXPECTED_MAGIC:
        start, size = (getattr(XNNHeader.from_bytes(header), f"flatbuffer_{name}") for name in ("offset", "size"))
        payload = payload[start : start + size]
    with tempfile.TemporaryDirectory() as folder:
        schema, binary = Path(folder) / "schema.fbs", Path(folder) / "graph.bin"
        schema.write_bytes(importlib.resources.files(serialization).joinpath("schema.fbs").read_bytes())
        binary.write_bytes(payload)
        _flatc_decompile(folder, str(schema), str(binary), ["--raw-binary"])
        return json.loads(_INFINITE.sub(rb"\1Infinity", binary.with_suffix(".json").read_bytes()))
