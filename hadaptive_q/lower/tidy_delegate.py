"""Take out of a delegate what changes no number: operators done twice, transposes that undo each other, idle reshapes.

The ahead-of-time compiler works operator by operator: what two of them need in the other layout is transposed twice,
what two of them read in float is dequantized twice, and a permutation meets the one that its layout pass adds. Every
edit here keeps each remaining tensor bit for bit; what is left reads what it read before.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

from hadaptive_q.lower.delegate import Delegate, Node, Value, constants_of


def tidy_delegate(delegate: Delegate) -> None:
    """Apply every edit in place until none finds anything."""
    share_bias_scales(delegate)
    while any([edit(delegate) for edit in EDITS]):
        pass


def merge_repeated(delegate: Delegate) -> int:
    """Let the readers of an operator that was already done on the same inputs read the earlier result."""
    values, first = delegate.values, dict[Hashable, int]()
    same = {i: first.setdefault(_constant(value), i) for i, value in values.items() if constants_of(value)}
    done, repeated = dict[Hashable, Node](), []
    for node in delegate.nodes:
        for i in node.inputs:
            node.replace_input(i, same.get(i, i))
        (output, *more) = node.outputs
        key = (node.kind, repr(node.settings), repr(node.raw.output_min_max), *node.inputs, _format(values[output]))
        earlier = done.setdefault(key, node)
        if earlier is not node and not more and not values[output].is_external:
            same[output] = earlier.output
            repeated.append(node)
    delegate.remove(repeated)
    return len(repeated)


def cancel_transposes(delegate: Delegate) -> int:
    """Make one transpose of two in a row, and none of two that undo each other."""
    values, count = delegate.values, 0
    made = {output: node for node in delegate.nodes for output in node.outputs}
    for node in delegate.nodes:
        inner = made.get(node.inputs[0]) if node.kind == "XNNStaticTranspose" else None
        if inner is None or inner.kind != "XNNStaticTranspose":
            continue
        (source,) = inner.inputs
        order = [inner.fields.perm[axis] for axis in node.fields.perm]
        if order == sorted(order):
            if values[node.output].is_external or not values[source].like(values[node.output]):
                continue
            delegate.replace_value(node.output, source)
            delegate.remove([node])
        else:
            node.fields.perm = order
            node.replace_input(inner.output, source)
        count += 1
    return count + _drop_unread(delegate)


def drop_idle_reshapes(delegate: Delegate) -> int:
    """Drop reshapes to the shape a tensor has, and let a reshape of a reshape read what came first."""
    values, count = delegate.values, 0
    made = {output: node for node in delegate.nodes for output in node.outputs}
    for node in delegate.nodes:
        if node.kind != "XNNStaticReshape":
            continue
        (source,) = node.inputs
        inner = made.get(source)
        if values[source].like(values[node.output]) and not values[node.output].is_external:
            delegate.replace_value(node.output, source)
            delegate.remove([node])
        elif inner is not None and inner.kind == "XNNStaticReshape":
            # A size of 0 stands for that of the input, which is now another one.
            node.fields.new_shape = values[node.output].dims
            node.replace_input(source, inner.inputs[0])
        else:
            continue
        count += 1
    return count + _drop_unread(delegate)


def narrow_early(delegate: Delegate) -> int:
    """Quantize before a transpose that nothing else reads: a quarter of the bytes move, or none."""
    values, count = delegate.values, 0
    made = {output: node for node in delegate.nodes for output in node.outputs}
    for node in delegate.nodes:
        inner = made.get(node.inputs[0]) if node.kind == "XNNConvert" else None
        if inner is None or inner.kind != "XNNStaticTranspose" or not values[node.output].is_quantized:
            continue
        read = sum(inner.output in other.inputs for other in delegate.nodes)
        if read == 1 and not any(values[i].is_external for i in (inner.output, node.output)):
            delegate.swap(inner, node)
            count += 1
    return count


EDITS: tuple[Callable[[Delegate], int], ...] = (merge_repeated, narrow_early, cancel_transposes, drop_idle_reshapes)


def share_bias_scales(delegate: Delegate) -> int:
    """Let every bias name its weight's scales as its own and return how many did.

    The runtime asks for scales of a bias and computes with those of the weight and of both activations: as many floats
    again as there are channels, which nothing reads.
    """
    values, count = delegate.values, 0
    for node in delegate.nodes:
        pair = [getattr(node.fields, name, None) for name in ("filter_id", "bias_id")]
        weight, bias = (values[i].quantization if i in values else None for i in pair)
        if weight is None or bias is None or bias.scale_buffer_idx == weight.scale_buffer_idx:
            continue
        if bias.num_scales == weight.num_scales > 0:
            bias.scale_buffer_idx = weight.scale_buffer_idx
            count += 1
    return count


def _drop_unread(delegate: Delegate) -> int:
    """Remove operators whose results nothing reads, the last ones first."""
    read = {i for node in delegate.nodes for i in node.inputs}
    values = delegate.values
    idle = [n for n in delegate.nodes if not any(i in read or values[i].is_external for i in n.outputs)]
    delegate.remove(idle)
    return len(idle) + _drop_unread(delegate) if idle else 0


def _constant(value: Value) -> Hashable:
    return (value.tensor.constant_buffer_idx, _format(value))


def _format(value: Value) -> Hashable:
    return (value.datatype, tuple(value.dims), repr(value.quantization))
