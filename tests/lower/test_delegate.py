"""A delegate's graph: what its nodes read and make, which constants are packed, and what is written."""

from __future__ import annotations

import pytest
from executorch.backends.xnnpack import xnnpack_preprocess
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as schema

from hadaptive_q.lower.delegate import INVALID, Delegate, constants_of, kept_graphs, write_delegate

SHAPE = [1, 4]


def tensor(place: int, constant: int = 0, external: int | None = None, flags: int = 0) -> schema.XValue:
    """A float tensor."""
    kind = schema.XNNDatatype.xnn_datatype_fp32
    external_id = INVALID if external is None else external
    return schema.XValue(schema.XNNTensorValue(kind, len(SHAPE), SHAPE, constant, external_id, flags, place))


@pytest.fixture
def delegate() -> Delegate:
    """``(x W + b) + c``: W and b are packed when the file is loaded, c is read at every inference."""
    fully_connected = schema.XNNFullyConnected(input1_id=0, filter_id=1, bias_id=2, output_id=4, flags=0)
    add = schema.XNNAdd(input1_id=4, input2_id=3, output_id=5, flags=0)
    unused = schema.ConstantDataOffset(2**64 - 1, 3, "unused")
    table = [schema.ConstantDataOffset(2**64 - 1, 64, name) for name in ("weight", "bias", "shift")]
    graph = schema.XNNGraph(
        version="0",
        xnodes=[schema.XNode(fully_connected, 7), schema.XNode(add, 8)],
        xvalues=[
            tensor(0, external=0, flags=1),
            *(tensor(i, constant=i) for i in (1, 2, 3)),
            tensor(4),
            tensor(5, external=1, flags=2),
        ],
        num_externs=2,
        input_ids=[0],
        output_ids=[5],
        constant_data=[schema.ConstantDataOffset(0, 0), *table, unused],
    )
    return Delegate(graph, {"weight": b"w" * 20, "bias": b"b" * 4, "shift": b"s" * 8, "unused": b"u" * 99})


def test_nodes_name_what_they_read_and_make(delegate: Delegate) -> None:
    first, second = delegate.nodes
    assert (first.kind, first.inputs, first.output, first.debug_handle) == ("XNNFullyConnected", [0, 1, 2], 4, 7)
    assert second.inputs == [4, 3]
    assert second.settings == {"flags": 0}
    assert delegate.values[0].is_external
    assert not delegate.values[4].is_external


def test_unused_places_are_no_inputs(delegate: Delegate) -> None:
    cat = schema.XNNConcatenate2(
        1, input1_id=4, input2_id=3, input3_id=0, input4_id=0, input5_id=0, output_id=5, flags=0
    )
    delegate.graph.xnodes[1] = schema.XNode(cat, 8)
    delegate.graph.xnodes[0].xnode_union.bias_id = INVALID
    first, second = delegate.nodes
    assert second.inputs == [4, 3]
    assert first.inputs == [0, 1]


def test_only_what_the_runtime_copies_is_packed(delegate: Delegate) -> None:
    assert delegate.packed_constants() == {1, 2}
    delegate.graph.xnodes[1].xnode_union.input2_id = 2
    assert delegate.packed_constants() == {1}, "a constant that is read at every inference must stay outside"


def test_constants_lie_inside_once_and_unused_ones_nowhere(delegate: Delegate) -> None:
    with pytest.MonkeyPatch.context() as patch:
        written: list[tuple[schema.XNNGraph, bytes]] = []
        module = "hadaptive_q.lower.delegate.serialize_xnnpack_binary"
        patch.setattr(module, lambda graph, region: written.append((graph, bytes(region))) or b"payload")
        payload, outside = write_delegate(delegate)
    assert (payload, outside) == (b"payload", {"shift": b"s" * 8})
    ((graph, region),) = written
    by_value = {v.xvalue_union.id_out: graph.constant_data[v.xvalue_union.constant_buffer_idx] for v in graph.xvalues}
    for place, data in ((1, b"w" * 20), (2, b"b" * 4)):
        entry = by_value[place]
        assert entry.named_key is None
        assert entry.offset % 16 == 0
        assert region[entry.offset : entry.offset + entry.size] == data
    assert by_value[3].named_key == "shift"
    assert by_value[4] == schema.ConstantDataOffset(0, 0)
    assert b"u" not in region
    # The graph it was written from is as it was.
    assert constants_of(delegate.values[3]) == {3}


def test_removed_nodes_take_their_values_along(delegate: Delegate) -> None:
    delegate.replace_value(4, 0)
    delegate.remove(delegate.nodes[:1])
    assert [node.inputs for node in delegate.nodes] == [[0, 3]]
    assert sorted(delegate.values) == [0, 3, 5]


def test_the_compiler_is_left_as_it_was() -> None:
    before = xnnpack_preprocess.serialize_xnnpack_binary

    def fail() -> None:
        with kept_graphs() as graphs:
            assert xnnpack_preprocess.serialize_xnnpack_binary is not before
            raise ValueError(f"{len(graphs)} compiled")

    with pytest.raises(ValueError, match="0 compiled"):
        fail()
    assert xnnpack_preprocess.serialize_xnnpack_binary is before
