"""Split a depthwise convolution of many taps into a sum of dilated ones that XNNPACK has fast kernels for.

XNNPACK's depthwise kernels cover up to 25 taps; beyond, a 7x7 falls to a grouped matrix product with one channel per
group, at thirty times the cost. Its taps are dealt to the cheapest set of smaller kernels (`tap_sets`), each a
convolution with a dilation and a symmetric padding of its own, so the sum needs no slice and no padding operator. Exact
up to the order of summation, for every odd kernel and every stride. A convolution without any padding stays whole: all
of its parts but one would have to read a piece of the input only.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from hadaptive_q.rewrite.graph import add_parameter, aten, calls, constant, conv_settings, finish, is_depthwise
from hadaptive_q.rewrite.tap_sets import MAX_TAPS, Part, cover, spacing


def split_depthwise(graph: GraphModule) -> int:
    """Split every depthwise convolution of more than 25 taps in place and return how many there were."""
    count = 0
    for conv in calls(graph, aten.conv2d.default):
        weight = constant(graph, conv.args[1])
        settings = conv_settings(conv)
        if weight is None or not is_depthwise(graph, conv) or settings.dilation != [1, 1]:
            continue
        height, width = weight.shape[2:]
        if height * width <= MAX_TAPS or height % 2 == 0 or width % 2 == 0:
            continue
        parts = cover(height, width, (settings.padding[0], settings.padding[1]))
        if parts is None:
            continue
        _split(graph, conv, parts)
        count += 1
    finish(graph)
    return count


def _split(graph: GraphModule, conv: Node, parts: tuple[Part, ...]) -> None:
    weight = constant(graph, conv.args[1])
    bias = constant(graph, conv.args[2]) if len(conv.args) > 2 else None
    assert weight is not None
    channels, settings = weight.shape[0], conv_settings(conv)
    total: Node | None = None
    for index, (rows, columns) in enumerate(parts):
        part = weight[:, :, list(rows)][:, :, :, list(columns)]
        name = f"{conv.args[1]}_part{index}"
        weight_node = add_parameter(graph, name, part, conv)
        # The bias belongs to one part only.
        bias_node = add_parameter(graph, f"{name}_bias", bias, conv) if bias is not None and index == 0 else None
        dilation = [spacing(rows), spacing(columns)]
        own_padding = [settings.padding[0] - rows[0], settings.padding[1] - columns[0]]
        args = (conv.args[0], weight_node, bias_node, settings.stride, own_padding, dilation, channels)
        with graph.graph.inserting_before(conv):
            new = graph.graph.call_function(aten.conv2d.default, args)
            new.meta = dict(conv.meta)
            if total is not None:
                new = graph.graph.call_function(aten.add.Tensor, (total, new))
                new.meta = dict(conv.meta)
        total = new
    assert total is not None
    conv.replace_all_uses_with(total)
