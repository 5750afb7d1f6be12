"""Split a depthwise convolution of many taps into a sum of dilated ones that XNNPACK has fast kernels for.

XNNPACK's depthwise kernels cover up to 25 taps; beyond, a 7x7 falls to a grouped matrix product with one channel per
group, at thirty times the cost. The rows (and, where needed, columns) of the kernel are dealt into sets that are
symmetric about the centre and evenly spaced, such as {0, 3, 6}, {1, 5}, {2, 4}: each is a smaller convolution with a
dilation and a symmetric padding of its own, so the sum needs no slice and no padding operator. Exact up to the order of
summation, for every odd kernel and every stride. A convolution padded by less than the first place of one of its sets
would need to read a part of its input only, and stays whole.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from hadaptive_q.rewrite.graph import add_parameter, aten, calls, constant, conv_settings, finish, is_depthwise

MAX_TAPS = 25


def split_depthwise(graph: GraphModule) -> int:
    """Split every depthwise convolution of more than 25 taps in place and return how many there were."""
    count = 0
    for conv in calls(graph, aten.conv2d.default):
        weight = constant(graph, conv.args[1])
        settings = conv_settings(conv)
        if weight is None or not is_depthwise(graph, conv) or settings.dilation != [1, 1]:
            continue
        padding = settings.padding
        height, width = weight.shape[2:]
        if height * width <= MAX_TAPS or height % 2 == 0 or width % 2 == 0:
            continue
        if any(padding[0] < rows[0] or padding[1] < columns[0] for rows, columns in _sets(height, width)):
            continue
        _split(graph, conv)
        count += 1
    finish(graph)
    return count


def deal(size: int, most: int) -> list[list[int]]:
    """Deal ``range(size)`` (odd) into symmetric, evenly spaced sets of at most `most` members, few sets first.

    The centre goes with the outer pair where three fit, alone otherwise; other pairs ``(i, size - 1 - i)`` stay pairs.
    """
    centre = size // 2
    if size <= most:
        return [list(range(size))]
    pairs = [[i, size - 1 - i] for i in range(centre)]
    if most >= 3:
        return [[0, centre, size - 1], *pairs[1:]]
    return [[centre], *pairs] if most == 2 else [[i] for i in range(size)]


def _sets(height: int, width: int) -> list[tuple[list[int], list[int]]]:
    """Return the (rows, columns) of every part: whole rows if at least a pair of them fits, else pairs of both."""
    rows = deal(height, max(2, MAX_TAPS // width))
    columns = deal(width, MAX_TAPS // max(len(r) for r in rows))
    return [(r, c) for r in rows for c in columns]


def _split(graph: GraphModule, conv: Node) -> None:
    weight = constant(graph, conv.args[1])
    bias = constant(graph, conv.args[2]) if len(conv.args) > 2 else None
    assert weight is not None
    channels, settings = weight.shape[0], conv_settings(conv)
    total: Node | None = None
    for index, (rows, columns) in enumerate(_sets(*weight.shape[2:])):
        part = weight[:, :, rows][:, :, :, columns]
        name = f"{conv.args[1]}_part{index}"
        weight_node = add_parameter(graph, name, part, conv)
        # The bias belongs to one part only.
        bias_node = add_parameter(graph, f"{name}_bias", bias, conv) if bias is not None and index == 0 else None
        dilation = [_spacing(rows), _spacing(columns)]
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


def _spacing(places: list[int]) -> int:
    return places[1] - places[0] if len(places) > 1 else 1
