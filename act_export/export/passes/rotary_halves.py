"""Cosines and sines without the repetition that multiplying a whole head by them needs."""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir

from act_export.export.passes.columns import columns_of
from act_export.export.passes.initializers import few_numbers, single_number
from act_export.export.passes.shapes import dims, give, is_last_axis, rank, width

Style = Literal["halves", "pairs"]
"""Which two elements of a head are rotated together: i and i + n / 2, or 2 i and 2 i + 1."""

_UNARY = {"Cast", "Cos", "Neg", "Sin"}
_SCALING = {"Add", "Div", "Mul", "Sub"}


class RotaryHalves:
    """Finds, of values (batch, 1, sequence, n) or (batch, sequence, 1, n), the different half (batch, sequence, n / 2).

    What is found belongs in the graph beside the value that it is half of: operators after the repetition, such as a
    cosine, are repeated on the half. Each is made once.
    """

    def __init__(self, graph: ir.Graph) -> None:
        """Takes the graph that new nodes go into."""
        self._graph = graph
        self._found: dict[tuple[ir.Value, Style], ir.Value | None] = {}

    def half(self, value: ir.Value, style: Style) -> ir.Value | None:
        """The half of a value that is made by repeating it; None if that can't be shown.

        Args:
            value: (.., n).
            style: "halves" if n are the half, and the half again; "pairs" if each number comes twice.
        """
        key = (value, style)
        if key not in self._found:
            self._found[key] = self._search(value, style)
        return self._found[key]

    def without_heads(self, value: ir.Value) -> ir.Value | None:
        """(batch, sequence, n) of a value that has it, with an axis for heads put in."""
        columns = columns_of(value)
        if columns is not None and columns.taken == range(width(columns.source) // 2):
            half = self.half(columns.source, "halves")
            if half is not None:
                return half
        if rank(value) == 3:
            return value
        node = value.producer()
        if node is None or node.op_type != "Unsqueeze" or _adds_last_axis(node) or rank(node.inputs[0]) != 3:
            return None
        return node.inputs[0]

    def _search(self, value: ir.Value, style: Style) -> ir.Value | None:
        node = value.producer()
        if node is None or node.domain != "":
            return None
        if node.op_type == "Unsqueeze":
            source = node.inputs[0]
            return None if source is None or _adds_last_axis(node) else self.half(source, style)
        if node.op_type in _UNARY or node.op_type in _SCALING:
            return self._computed(node, style)
        repeated = _doubled(node) if style == "halves" else _interleaved(node)
        return None if repeated is None else self.without_heads(repeated)

    def _computed(self, node: ir.Node, style: Style) -> ir.Value | None:
        """An operator on single numbers, on the half of what it gets."""
        varying = [value for value in node.inputs if single_number(value) is None]
        if len(varying) != 1 or varying[0] is None or rank(varying[0]) != rank(node.outputs[0]):
            return None
        half = self.half(varying[0], style)
        if half is None:
            return None
        inputs = [half if value is varying[0] else value for value in node.inputs]
        same = give(ir.node(node.op_type, inputs, dict(node.attributes)), node.outputs[0], dims(half))
        self._graph.insert_after(node, same)
        return same.outputs[0]


def _doubled(node: ir.Node) -> ir.Value | None:
    """What a Concat puts twice side by side."""
    if node.op_type != "Concat" or len(node.inputs) != 2 or node.inputs[0] is not node.inputs[1]:
        return None
    return node.inputs[0] if is_last_axis(node.attributes["axis"].as_int(), node.outputs[0]) else None


def _interleaved(node: ir.Node) -> ir.Value | None:
    """(.., n) of (.., 2 n) made by Unsqueeze to (.., n, 1), Expand to (.., n, 2) and Reshape."""
    expand = _producer(node, "Reshape")
    unsqueeze = _producer(expand, "Expand")
    source = unsqueeze.inputs[0] if unsqueeze is not None and unsqueeze.op_type == "Unsqueeze" else None
    if expand is None or unsqueeze is None or source is None or not _adds_last_axis(unsqueeze) or not width(source):
        return None
    leading = dims(source)[:-1]
    fits = dims(expand.outputs[0]) == (*leading, width(source), 2)
    return source if fits and dims(node.outputs[0]) == (*leading, 2 * width(source)) else None


def _producer(node: ir.Node | None, op_type: str) -> ir.Node | None:
    """What makes the first input of a node, if the node is of this type."""
    if node is None or node.op_type != op_type or node.inputs[0] is None:
        return None
    return node.inputs[0].producer()


def _adds_last_axis(unsqueeze: ir.Node) -> bool:
    axes = few_numbers(unsqueeze.inputs[1])
    return axes is None or any(is_last_axis(int(axis), unsqueeze.outputs[0]) for axis in axes.reshape(-1))
