"""LayerNormalization in place of a mean that is subtracted and an RMSNormalization."""

from __future__ import annotations

import onnx_ir as ir

from act_export.export.passes.initializers import few_numbers
from act_export.export.passes.replace_node import replace_node
from act_export.export.passes.shapes import is_last_axis


class FuseLayerNormPass(ir.passes.InPlacePass):
    """Turns RMSNormalization(x - mean(x)) into LayerNormalization(x) without bias.

    torch's exporter finds the second half of a layer norm that is written out, as Cohere's is. Means of other than the
    last axis are left alone.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites every match in the main graph."""
        graph, modified = model.graph, False
        for node in list(graph):
            x = _centred(node)
            if x is None or node.outputs[0].is_graph_output():
                continue
            norm = ir.node("LayerNormalization", [x, *node.inputs[1:]], dict(node.attributes))
            replace_node(graph, node, norm)
            modified = True
        return ir.passes.PassResult(model, modified)


def _centred(norm: ir.Node) -> ir.Value | None:
    """The x of a norm of x - mean(x) over the last axis."""
    if norm.op_type != "RMSNormalization" or norm.domain != "" or norm.inputs[0] is None:
        return None
    centre = norm.inputs[0].producer()
    of_last = is_last_axis(norm.attributes.get_int("axis", -1), norm.inputs[0])
    if centre is None or centre.op_type != "Sub" or not of_last:
        return None
    x, subtracted = centre.inputs
    mean = None if subtracted is None else subtracted.producer()
    if x is None or mean is None or mean.op_type != "ReduceMean" or mean.inputs[0] is not x:
        return None
    axes = few_numbers(mean.inputs[1]) if len(mean.inputs) > 1 else None
    is_mean_of_last = axes is not None and axes.size == 1 and is_last_axis(int(axes.reshape(())), x)
    return x if is_mean_of_last and mean.attributes.get_int("keepdims", 1) == 1 else None
