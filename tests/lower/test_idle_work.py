"""The file is the one that the compiler gives when it does all its idle work, too, and that work is not done."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from executorch.backends.xnnpack._passes.xnnpack_pass import XNNPACKPass
from executorch.exir.pass_base import ExportPass
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.traceback import NodeSource

from hadaptive_q.lower import executorch as lowering
from hadaptive_q.lower.idle_work import without_idle_work
from hadaptive_q.models.config import Preprocess
from hadaptive_q.quant.backends import torchao_pt2e as backend
from hadaptive_q.quant.plan import make_plan
from hadaptive_q.quant.program import QuantizedProgram
from hadaptive_q.recipe import QuantizeConfig
from hadaptive_q.rewrite.graph import trace


class Net(nn.Module):
    """Layers that compiler passes edit: activations they fuse, pooling, a Linear, layouts they add transposes for."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        y = nn.functional.hardswish(self.second(x))
        out: Tensor = self.head(torch.cat([x.mean((-1, -2)), y.mean((-1, -2))], 1))
        return out


def quantized() -> QuantizedProgram:
    torch.manual_seed(0)
    graph = trace(Net(), 8)
    prepared = backend.prepare(graph, make_plan(graph, QuantizeConfig()), "minmax")
    preprocess = Preprocess(image_size=8, mean=(0, 0, 0), std=(1, 1, 1), classes=tuple("abcde"))
    return backend.convert(backend.calibrate(prepared, [torch.randn(16, 3, 8, 8)]), preprocess)


def test_the_file_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    traces: list[int] = []
    interpret = ExportPass.call_submodule

    def counted(self: ExportPass, module: GraphModule, inputs: tuple[object, ...]) -> PassResult:
        traces[-1] += isinstance(self, XNNPACKPass)
        return interpret(self, module, inputs)

    monkeypatch.setattr(ExportPass, "call_submodule", counted)

    @contextmanager
    def idle() -> Iterator[None]:
        yield

    exported = quantized().export()
    traces.append(0)
    spared = lowering.lower(exported)
    monkeypatch.setattr(lowering, "without_idle_work", idle)
    traces.append(0)
    whole = lowering.lower(exported)
    assert spared.data == whole.data
    assert spared.coverage == whole.coverage
    assert 0 < traces[0] < traces[1] / 2


class Doubled(ExportPass):
    """Edits while it traces: every negation is done twice."""

    def call_operator(self, op: object, *rest: object) -> object:
        once = super().call_operator(op, *rest)
        return super().call_operator(op, (once,), *rest[1:]) if op == NEG else once


NEG = torch.ops.aten.neg.default


class Negated(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -x


def negated() -> GraphModule:
    return torch.export.export(Negated(), (torch.zeros(3),)).graph_module


def negations(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.target == NEG]


def test_an_untouched_graph_is_kept_and_an_edited_one_traced() -> None:
    module = negated()
    with without_idle_work():
        first = ExportPass()(module).graph_module
        assert first is not module, "never traced before"
        assert ExportPass()(first).graph_module is first
        (neg,) = negations(first.graph)
        with first.graph.inserting_after(neg):
            again = first.graph.call_function(NEG, (neg,))
        neg.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)
        second = ExportPass()(first).graph_module
        assert second is not first
        assert all("val" in node.meta for node in negations(second.graph))
        negations(second.graph)[0].meta["val"] = negations(second.graph)[1].meta["val"]
        assert ExportPass()(second).graph_module is not second, "an example is not the one that the trace gave"
    assert ExportPass()(second).graph_module is not second, "all as before"


def test_passes_that_edit_while_they_trace_always_run() -> None:
    module = negated()
    with without_idle_work():
        first = ExportPass()(module).graph_module
        second = Doubled()(first).graph_module
        assert len(negations(second.graph)) == 2
        assert len(negations(Doubled()(second).graph_module.graph)) == 4


def test_histories_are_copied_again_afterwards() -> None:
    source = NodeSource(negations(negated().graph)[0])
    with without_idle_work():
        assert copy.deepcopy(source) is source
    assert copy.deepcopy(source) is not source
