"""Query, key and value as parts, side by side, of what one product gives."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from act_export.export.passes.initializers import (
    constant,
    few_numbers,
    integers,
    lazily,
    register,
    sizes,
)
from act_export.export.passes.shapes import Size, dims, give, rank

_LEADING = 2  # axes of tokens: batch and sequence


class StraightenProjectionsPass(ir.passes.InPlacePass):
    """Turns what takes the columns of a linear layer apart, by reshapes, slices and splits, into one Split.

    Some checkpoints store query, key and value in one matrix, head by head. Its columns are put in the order in which
    they are wanted, so that each of the three is a contiguous part. The matrix is reordered when it is written. Left
    alone: products of which some columns go to several places or nowhere, or whose weight something else uses.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites every match in the main graph."""
        graph, modified = model.graph, False
        for node in list(graph):
            linear = _linear(node)
            parts = None if linear is None else _parts(linear)
            if linear is not None and parts is not None:
                _straighten(graph, linear, parts)
                modified = True
        return ir.passes.PassResult(model, modified)


@dataclass(frozen=True)
class _Linear:
    """A MatMul by a weight (inputs, columns), and the Add of its bias if there is one."""

    weight: ir.Value
    bias: ir.Value | None
    last: ir.Node
    columns: int

    @property
    def result(self) -> ir.Value:
        return self.last.outputs[0]


@dataclass(frozen=True)
class _Part:
    """A value (batch, sequence, ..), and the column that each of its elements of a token is."""

    value: ir.Value
    columns: np.ndarray


def _linear(node: ir.Node) -> _Linear | None:
    if node.op_type != "MatMul" or node.domain != "":
        return None
    product, weight = node.outputs[0], node.inputs[1]
    tensor = constant(weight)
    if weight is None or tensor is None or len(tensor.shape) != 2 or len(weight.uses()) != 1:
        return None
    columns = sizes(tensor)[1]
    users = [user for user, _ in product.uses()]
    if len(users) == 1 and users[0].op_type == "Add" and not product.is_graph_output():
        for value in users[0].inputs:
            bias = constant(value)
            if bias is not None and sizes(bias) == (columns,):
                return _Linear(weight, value, users[0], columns)
    return _Linear(weight, None, node, columns)


def _parts(linear: _Linear) -> list[_Part] | None:
    """What others take of the result; None if it can't be one Split, or is one."""
    whole = linear.result
    if rank(whole) != _LEADING + 1:
        return None
    parts, pending = [], [_Part(whole, np.arange(linear.columns))]
    while pending:
        part = pending.pop()
        if part.value.is_graph_output():
            return None
        moved = [_moved(user, part, dims(whole)[:_LEADING]) for user, _ in part.value.uses()]
        if not moved or any(found is None for found in moved):
            parts.append(part)
        pending.extend(smaller for found in moved if found is not None for smaller in found)
    parts.sort(key=lambda part: int(part.columns.min()))
    order = _order(parts)
    if len(parts) < 2 or not np.array_equal(np.sort(order), np.arange(linear.columns)):
        return None
    users = [user for user, _ in whole.uses()]
    is_split = len(users) == 1 and users[0].op_type == "Split"
    return None if is_split and np.array_equal(order, np.arange(linear.columns)) else parts


def _order(parts: Sequence[_Part]) -> np.ndarray:
    return np.concatenate([part.columns.reshape(-1) for part in parts])


def _moved(node: ir.Node, part: _Part, leading: Sequence[Size]) -> list[_Part] | None:
    """What a node makes of the columns of each token; None if it computes, or mixes tokens."""
    if node.domain != "" or node.inputs[0] is not part.value:
        return None
    shapes = [_of_token(value, leading) for value in node.outputs]
    taken = list(_taken(node, part.columns, shapes))
    if len(taken) != len(node.outputs) or any(
        shape is None or columns is None or columns.size == 0 or columns.size != math.prod(shape)
        for columns, shape in zip(taken, shapes, strict=True)
    ):
        return None
    return [
        _Part(value, columns.reshape(shape))
        for value, columns, shape in zip(node.outputs, taken, shapes, strict=True)
        if columns is not None and shape is not None and value.uses()
    ]


def _of_token(value: ir.Value, leading: Sequence[Size]) -> list[int] | None:
    """The shape without batch and sequence."""
    if dims(value)[:_LEADING] != tuple(leading):
        return None
    rest = [size for size in dims(value)[_LEADING:] if isinstance(size, int)]
    return rest if len(rest) == rank(value) - _LEADING else None


def _taken(node: ir.Node, columns: np.ndarray, shapes: Sequence[list[int] | None]) -> Iterator[np.ndarray | None]:
    """The columns in each output."""
    if node.op_type in ("Reshape", "Squeeze", "Unsqueeze"):
        yield columns
    elif node.op_type == "Transpose":
        order = node.attributes.get_ints("perm", ())
        yield columns.transpose([axis - _LEADING for axis in order[_LEADING:]]) if order[:_LEADING] == (0, 1) else None
    elif node.op_type == "Gather":
        axis, indices = _axis(node.attributes.get_int("axis", 0), columns), few_numbers(node.inputs[1])
        yield None if axis is None or indices is None else columns.take(indices, axis)
    elif node.op_type == "Slice":
        yield _sliced(node, columns)
    elif node.op_type == "Split":
        axis, start = _axis(node.attributes.get_int("axis", 0), columns), 0
        for shape in shapes:
            if axis is None or shape is None:
                return
            yield columns.take(range(start, min(start + shape[axis], columns.shape[axis])), axis)
            start += shape[axis]


def _axis(axis: int, columns: np.ndarray) -> int | None:
    """An axis of (batch, sequence, ..) counted without these two; None for these two."""
    axis = axis if axis >= 0 else axis + columns.ndim + _LEADING
    return axis - _LEADING if axis >= _LEADING else None


def _sliced(node: ir.Node, columns: np.ndarray) -> np.ndarray | None:
    bounds = [few_numbers(value) for value in node.inputs[1:]]
    if len(bounds) < 3 or any(numbers is None or numbers.size != 1 for numbers in bounds):
        return None
    start, stop, axis, *step = (int(numbers.reshape(())) for numbers in bounds if numbers is not None)
    along = _axis(axis, columns)
    if along is None:
        return None
    return columns.take(range(columns.shape[along])[start : stop : (step or [1])[0]], along)


def _straighten(graph: ir.Graph, linear: _Linear, parts: Sequence[_Part]) -> None:
    order = _order(parts)
    if not np.array_equal(order, np.arange(linear.columns)):
        _reorder(graph, linear, order)
    whole = linear.result
    split = ir.node(
        "Split",
        [whole, integers(graph, "split", [part.columns.size for part in parts])],
        {"axis": -1},
        num_outputs=len(parts),
    )
    nodes = [split]
    for part, flat in zip(parts, split.outputs, strict=True):
        flat.type, flat.shape = whole.type, ir.Shape([*dims(whole)[:_LEADING], part.columns.size])
        result = flat
        if part.columns.ndim > 1:
            shaped = ir.node("Reshape", [flat, integers(graph, "shape", [0, 0, *part.columns.shape])])
            nodes.append(give(shaped, whole, dims(part.value)))
            result = shaped.outputs[0]
        part.value.replace_all_uses_with(result)
    graph.insert_after(linear.last, nodes)


def _reorder(graph: ir.Graph, linear: _Linear, order: np.ndarray) -> None:
    weight = constant(linear.weight)
    assert weight is not None  # by `_linear`
    name = str(linear.weight.name)
    linear.weight.const_value = lazily(weight, lambda values: values[:, order], sizes(weight), name)
    if linear.bias is None:
        return
    bias = constant(linear.bias)
    assert bias is not None  # by `_linear`
    name = str(linear.bias.name)
    if len(linear.bias.uses()) == 1:
        linear.bias.const_value = lazily(bias, lambda values: values[order], sizes(bias), name)
        return
    own = f"{name}.{linear.result.name}"  # other layers have the same bias
    copy = register(graph, lazily(bias, lambda values: values[order], sizes(bias), own))
    linear.last.replace_input_with(list(linear.last.inputs).index(linear.bias), copy)
