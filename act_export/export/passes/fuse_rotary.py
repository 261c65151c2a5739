"""RotaryEmbedding in place of the arithmetic that rotates the elements of a head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations, product

import onnx_ir as ir

from act_export.export.passes.columns import columns_of
from act_export.export.passes.initializers import few_numbers, integers
from act_export.export.passes.rotary_halves import RotaryHalves, Style
from act_export.export.passes.shapes import dims, give, is_last_axis, rank, width


class FuseRotaryPass(ir.passes.InPlacePass):
    """Turns x * cos + rotated(x) * sin, and the same written for the two parts of x apart, into RotaryEmbedding.

    torch's exporter does so only in the commonest form. Here cos and sin may be scaled, as YaRN and LongRoPE do it, and
    the two elements that are rotated together may lie half a head apart or side by side. Left alone: rotations of other
    than (batch, heads, sequence, size) or (batch, sequence, heads, size), and those whose cosines and sines can't be
    shown to be the same for both elements.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites every match in the main graph."""
        graph, modified = model.graph, False
        halves = RotaryHalves(graph)
        for node in list(graph):
            rotation = _rotation(node, halves)
            if rotation is not None and not node.outputs[0].is_graph_output():
                modified |= _fuse(graph, node, rotation)
        return ir.passes.PassResult(model, modified)


@dataclass(frozen=True)
class _Rotation:
    """x (.., n), cos and sin (batch, sequence, n / 2); `heads_axis` is the axis that cos and sin had as 1."""

    x: ir.Value
    cos: ir.Value
    sin: ir.Value
    style: Style
    heads_axis: int


def _rotation(node: ir.Node, halves: RotaryHalves) -> _Rotation | None:
    if node.domain != "":
        return None
    if node.op_type == "Add":
        return next(_of_whole(node, halves), None)
    return next(_of_parts(node, halves), None) if node.op_type == "Concat" else None


def _of_whole(add: ir.Node, halves: RotaryHalves) -> Iterator[_Rotation]:
    """x * cos + rotated(x) * sin."""
    for first, second in permutations(map(_factors, add.inputs)):
        if not first or not second:
            return
        for (x, cos), (turned, sin) in product(permutations(first), permutations(second)):
            style = _style_of_turn(turned, x)
            axis = _heads_axis(cos)
            if style is None or axis is None or axis != _heads_axis(sin):
                continue
            half_cos, half_sin = halves.half(cos, style), halves.half(sin, style)
            if half_cos is not None and half_sin is not None:
                yield _Rotation(x, half_cos, half_sin, style, axis)


def _of_parts(concat: ir.Node, halves: RotaryHalves) -> Iterator[_Rotation]:
    """Concat(x1 * cos - x2 * sin, x2 * cos + x1 * sin), where x1 and x2 are the halves of x."""
    if len(concat.inputs) != 2 or not is_last_axis(concat.attributes["axis"].as_int(), concat.outputs[0]):
        return
    sub, add = (None if value is None else value.producer() for value in concat.inputs)
    if sub is None or add is None or (sub.op_type, add.op_type) != ("Sub", "Add"):
        return
    minuend, subtrahend = map(_factors, sub.inputs)
    if not minuend or not subtrahend:
        return
    for (x1, cos), (x2, sin) in product(permutations(minuend), permutations(subtrahend)):
        first, second = columns_of(x1), columns_of(x2)
        whole = x1 if first is None else first.source
        if first is None or second is None or second.source is not whole or not _are_halves(first.taken, second.taken):
            continue
        products = [set(_factors(value)) for value in add.inputs]
        axis = _heads_axis(cos)
        if axis is None or axis != _heads_axis(sin) or {x2, cos} not in products or {x1, sin} not in products:
            continue
        flat_cos, flat_sin = halves.without_heads(cos), halves.without_heads(sin)
        if flat_cos is not None and flat_sin is not None:
            yield _Rotation(whole, flat_cos, flat_sin, "halves", axis)


def _factors(value: ir.Value | None) -> tuple[ir.Value, ...]:
    """The two inputs of a Mul."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Mul" or node.domain != "":
        return ()
    return tuple(factor for factor in node.inputs if factor is not None)


def _heads_axis(value: ir.Value) -> int | None:
    """The axis of heads, of cosines or sines (batch, 1, sequence, n) or (batch, sequence, 1, n)."""
    ones = [axis for axis in (1, 2) if rank(value) == 4 and dims(value)[axis] == 1]
    return ones[0] if len(ones) == 1 else None


def _style_of_turn(turned: ir.Value, x: ir.Value) -> Style | None:
    """How a value was made of x, if it was by turning elements by 90 degrees: (a, b) becomes (-b, a)."""
    node = turned.producer()
    if node is None or node.domain != "":
        return None
    if node.op_type == "Concat":
        first, second = _negated_and_other(node, x, unsqueezed=False)
        return "halves" if _are_halves(second, first) else None
    stack = node.inputs[0].producer() if node.op_type == "Reshape" and node.inputs[0] is not None else None
    if stack is None or stack.op_type != "Concat" or not width(x) or dims(turned) != dims(x):
        return None
    first, second = _negated_and_other(stack, x, unsqueezed=True)
    return "pairs" if (second, first) == (range(0, width(x), 2), range(1, width(x), 2)) else None


def _negated_and_other(concat: ir.Node, x: ir.Value, *, unsqueezed: bool) -> tuple[range, range]:
    """The columns of x whose negation a Concat has first, and those that it has second; empty where it isn't so."""
    none = range(0), range(0)
    if len(concat.inputs) != 2 or not is_last_axis(concat.attributes["axis"].as_int(), concat.outputs[0]):
        return none
    parts = [_without_last_axis(value) if unsqueezed else value for value in concat.inputs]
    negation = None if parts[0] is None else parts[0].producer()
    if negation is None or negation.op_type != "Neg" or negation.inputs[0] is None or parts[1] is None:
        return none
    first, second = columns_of(negation.inputs[0]), columns_of(parts[1])
    if first is None or second is None or first.source is not x or second.source is not x:
        return none
    return first.taken, second.taken


def _without_last_axis(value: ir.Value | None) -> ir.Value | None:
    """(.., n) of (.., n, 1)."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Unsqueeze":
        return None
    axes = few_numbers(node.inputs[1])
    return (
        node.inputs[0] if axes is not None and axes.size == 1 and is_last_axis(int(axes[0]), node.outputs[0]) else None
    )


def _are_halves(first: range, second: range) -> bool:
    return bool(first) and first == range(len(first)) and second == range(len(first), 2 * len(first))


def _fuse(graph: ir.Graph, node: ir.Node, rotation: _Rotation) -> bool:
    x, size = rotation.x, width(rotation.x)
    if rank(x) != 4 or not size or dims(node.outputs[0]) != dims(x):
        return False
    batch, heads, sequence = dims(x)[0], dims(x)[rotation.heads_axis], dims(x)[3 - rotation.heads_axis]
    caches = [rotation.cos, rotation.sin]
    if not isinstance(heads, int) or any(dims(cache) != (batch, sequence, size // 2) for cache in caches):
        return False
    attributes = {"interleaved": int(rotation.style == "pairs"), "num_heads": heads}
    if rotation.heads_axis == 1:
        nodes = [give(ir.node("RotaryEmbedding", [x, *caches], attributes), x, dims(x))]
    else:
        flat = ir.node("Reshape", [x, integers(graph, "shape", [0, 0, heads * size])])
        rotary = ir.node("RotaryEmbedding", [flat.outputs[0], *caches], attributes)
        split = ir.node("Reshape", [rotary.outputs[0], integers(graph, "shape", [0, 0, heads, size])])
        nodes = [give(each, x, (batch, sequence, heads * size)) for each in (flat, rotary)]
        nodes.append(give(split, x, dims(x)))
    graph.insert_before(node, nodes)
    node.outputs[0].replace_all_uses_with(nodes[-1].outputs[0])
    return True
