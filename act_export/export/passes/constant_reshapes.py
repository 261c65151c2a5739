"""Reshapes to a constant shape."""

from __future__ import annotations

import onnx_ir as ir

from act_export.export.passes.initializers import constant, integers
from act_export.export.passes.shapes import dims


class ConstantReshapesPass(ir.passes.InPlacePass):
    """Gives Reshape a constant instead of a shape that the graph computes.

    torch's exporter puts (batch, sequence, heads, head size) together from the shapes of inputs. Where the dimensions
    that aren't known as numbers stay in their places, 0 says so. Others are left alone.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites every match in the main graph."""
        graph, modified = model.graph, False
        for node in graph:
            if node.op_type != "Reshape" or node.domain != "" or constant(node.inputs[1]) is not None:
                continue
            target = _target(node)
            if target is not None:
                node.replace_input_with(1, integers(graph, "shape", target))
                node.attributes.pop("allowzero", None)
                modified = True
        return ir.passes.PassResult(model, modified)


def _target(reshape: ir.Node) -> list[int] | None:
    before = dims(reshape.inputs[0])
    target: list[int] = []
    for axis, size in enumerate(dims(reshape.outputs[0])):
        stays = before[axis : axis + 1] == (size,) and size != ir.SymbolicDim(None)
        if isinstance(size, int) and size > 0:
            target.append(size)
        elif stays:
            target.append(0)
        else:
            return None
    return target or None
