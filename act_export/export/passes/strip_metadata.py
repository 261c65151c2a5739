"""What torch's exporter leaves behind for debugging."""

from __future__ import annotations

import onnx_ir as ir


class StripMetadataPass(ir.passes.InPlacePass):
    """Removes documentation strings and properties of nodes and values: about 1 MB for a model of 30 layers."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Strips the main graph."""
        graph = model.graph
        values = [*graph.inputs, *graph.initializers.values()]
        for node in graph:
            values.extend(node.outputs)
            node.metadata_props.clear()
            node.doc_string = None
        for value in values:
            value.metadata_props.clear()
            value.doc_string = None
        graph.metadata_props.clear()
        graph.doc_string = None
        return ir.passes.PassResult(model, modified=True)
