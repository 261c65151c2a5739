"""Reshapes that undo each other."""

from __future__ import annotations

import onnx_ir as ir


class CancelReshapesPass(ir.passes.InPlacePass):
    """Removes a Reshape whose result has the shape of what went into the chain of reshapes before it.

    Only where every dimension is known by number or by name; a chain that ends in another shape is left alone.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites every match in the main graph."""
        modified = False
        for node in list(model.graph):
            if node.op_type != "Reshape" or node.outputs[0].is_graph_output():
                continue
            source = _equal_ancestor(node)
            if source is not None:
                node.outputs[0].replace_all_uses_with(source)
                modified = True
        return ir.passes.PassResult(model, modified)


def _equal_ancestor(reshape: ir.Node) -> ir.Value | None:
    wanted = reshape.outputs[0].shape
    if wanted is None or any(dim == ir.SymbolicDim(None) for dim in wanted):
        return None
    node: ir.Node | None = reshape
    while node is not None and node.op_type == "Reshape":
        source = node.inputs[0]
        if source is None:
            return None
        if source.shape is not None and source.shape == wanted:
            return source
        node = source.producer()
    return None
