"""Shapes of values, as far as they are known."""

from __future__ import annotations

import onnx_ir as ir

Size = int | ir.SymbolicDim


def dims(value: ir.Value | None) -> tuple[Size, ...]:
    """The sizes of a value's axes; none if its rank isn't known."""
    return () if value is None or value.shape is None else tuple(value.shape)


def rank(value: ir.Value | None) -> int:
    """How many axes a value has; 0 if that isn't known, too."""
    return len(dims(value))


def width(value: ir.Value | None) -> int:
    """The size of the last axis; 0 if that isn't known."""
    last = dims(value)[-1:]
    return last[0] if last and isinstance(last[0], int) else 0


def is_last_axis(axis: int, value: ir.Value) -> bool:
    """Whether an axis of a value of known rank is its last."""
    return bool(dims(value)) and axis in (-1, rank(value) - 1)


def give(node: ir.Node, like: ir.Value, shape: tuple[Size, ...]) -> ir.Node:
    """Sets the shape of a new node's output, and its type to that of another value."""
    node.outputs[0].type, node.outputs[0].shape = like.type, ir.Shape(shape)
    return node
