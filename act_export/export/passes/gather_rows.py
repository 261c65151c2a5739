"""Gather in place of GatherND where whole rows are looked up."""

from __future__ import annotations

import onnx_ir as ir

from act_export.export.passes.initializers import few_numbers
from act_export.export.passes.replace_node import replace_node
from act_export.export.passes.shapes import is_last_axis


class GatherRowsPass(ir.passes.InPlacePass):
    """Turns GatherND(table, Unsqueeze(positions, -1)) into Gather(table, positions).

    GPT-J looks its sines and cosines up in this way.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites every match in the main graph."""
        graph, modified = model.graph, False
        for node in list(graph):
            rows = _rows(node)
            if rows is None or node.outputs[0].is_graph_output():
                continue
            replace_node(graph, node, ir.node("Gather", [node.inputs[0], rows], {"axis": 0}))
            modified = True
        return ir.passes.PassResult(model, modified)


def _rows(node: ir.Node) -> ir.Value | None:
    """The indices of rows that a node looks up."""
    if node.op_type != "GatherND" or node.domain != "" or node.attributes.get_int("batch_dims", 0) != 0:
        return None
    unsqueeze = None if node.inputs[1] is None else node.inputs[1].producer()
    if unsqueeze is None or unsqueeze.op_type != "Unsqueeze":
        return None
    axes = few_numbers(unsqueeze.inputs[1])
    alone = axes is not None and axes.size == 1 and is_last_axis(int(axes.reshape(())), unsqueeze.outputs[0])
    return unsqueeze.inputs[0] if alone else None
