"""Which columns of another value a value is made of."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from act_export.export.passes.initializers import few_numbers
from act_export.export.passes.shapes import is_last_axis, width


@dataclass(frozen=True)
class Columns:
    """Columns `taken` of the last axis of `source`, in order."""

    source: ir.Value
    taken: range


def columns_of(value: ir.Value) -> Columns | None:
    """What a Slice or Split of the last axis takes; None for any other value."""
    node = value.producer()
    if node is None or node.domain != "" or node.op_type not in ("Slice", "Split"):
        return None
    source = node.inputs[0]
    if source is None or not width(source):
        return None
    taken = _sliced(node, source) if node.op_type == "Slice" else _split(node, source, value)
    return None if taken is None else Columns(source, taken)


def _sliced(node: ir.Node, source: ir.Value) -> range | None:
    if len(node.inputs) < 4:
        return None
    bounds = [few_numbers(value) for value in node.inputs[1:]]
    if any(numbers is None or numbers.size != 1 for numbers in bounds):
        return None
    start, stop, axis, *step = (int(numbers.reshape(())) for numbers in bounds if numbers is not None)
    return range(width(source))[start : stop : (step or [1])[0]] if is_last_axis(axis, source) else None


def _split(node: ir.Node, source: ir.Value, part: ir.Value) -> range | None:
    if not is_last_axis(node.attributes.get_int("axis", 0), source):
        return None
    at = list(node.outputs).index(part)
    widths = [width(output) for output in node.outputs[: at + 1]]
    return range(sum(widths[:-1]), sum(widths)) if all(widths) else None
