"""Stretches of a graph that compute in another layout, between operators that change the layout and change it back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

_Test = Callable[[ir.Node], bool]

ELEMENTWISE = {"Abs", "Cast", "Erf", "Exp", "Gelu", "Identity", "Neg", "Relu", "Sigmoid", "Softplus", "Sqrt", "Tanh"}
BINARY = {"Add", "Div", "Mul", "Pow", "Sub"}
NORMS = {"LayerNormalization", "RMSNormalization"}


@dataclass(frozen=True)
class Layout:
    """How a graph enters and leaves another layout, and what can compute in either.

    Attributes:
        opens: Whether a node changes a value's layout and nothing else.
        closes: Whether it changes it back.
        carries: The inputs of a node that may be in the other layout, if all of them are and so is what it returns;
            empty for a node that can't compute in the other layout.
    """

    opens: _Test
    closes: _Test
    carries: Callable[[ir.Node], list[ir.Value]]


def leave(graph: ir.Graph, layout: Layout) -> list[ir.Node]:
    """Connects stretches to what is before and after the change of layout, wherever that is possible on all sides.

    Nodes that open and close stay behind, unused, unless something else uses them. A node that nothing uses counts as a
    use: remove those first.

    Returns:
        The nodes that now compute in the outer layout, whose attributes and shapes the caller has to adapt.
    """
    inside = _inside(graph, layout)
    openers = [node for node in graph if layout.opens(node) and _source(node).producer() not in inside]
    for opener in openers:
        for user, index in list(opener.outputs[0].uses()):
            if user in inside:
                user.replace_input_with(index, _source(opener))
    for node in inside:
        for output in node.outputs:
            _drop_closers(output, output, inside, layout)
    for opener in openers:
        _drop_closers(opener.outputs[0], _source(opener), inside, layout)
    return [node for node in graph if node in inside]


def _source(opener: ir.Node) -> ir.Value:
    source = opener.inputs[0]
    assert source is not None  # by `Layout.opens`
    return source


def _drop_closers(value: ir.Value, outer: ir.Value, inside: dict[ir.Node, None], layout: Layout) -> None:
    for user, _ in list(value.uses()):
        if user not in inside and layout.closes(user) and not user.outputs[0].is_graph_output():
            user.outputs[0].replace_all_uses_with(outer)


def _inside(graph: ir.Graph, layout: Layout) -> dict[ir.Node, None]:
    """The largest set of nodes whose neighbours are in the set, or open or close."""
    carried = {node: values for node in graph if (values := layout.carries(node))}
    while True:
        while lost := [node for node in carried if not _is_enclosed(node, carried, layout)]:
            for node in lost:
                del carried[node]
        # What opens one stretch can't be what closes another, of which it would get the outer layout.
        again = next((node for node in carried if _is_reopened(node, carried)), None)
        if again is None:
            return dict.fromkeys(carried)
        del carried[again]


def _is_reopened(node: ir.Node, carried: dict[ir.Node, list[ir.Value]]) -> bool:
    producers = [producer for value in carried[node] if (producer := value.producer()) is not None]
    return any(producer not in carried and _source(producer).producer() in carried for producer in producers)


def _is_enclosed(node: ir.Node, carried: dict[ir.Node, list[ir.Value]], layout: Layout) -> bool:
    for value in carried[node]:
        producer = value.producer()
        if producer is None or not (producer in carried or layout.opens(producer)):
            return False
    for output in node.outputs:
        if output.is_graph_output():
            return False
        for user, _ in output.uses():
            if user in carried:
                if output not in carried[user]:
                    return False
            elif not layout.closes(user) or user.outputs[0].is_graph_output():
                return False
    return True
