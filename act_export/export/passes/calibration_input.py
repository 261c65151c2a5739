"""An optional input that says how the heads are calibrated."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from act_export.onnx_file.names import CALIBRATION
from act_export.ops import schema

_INDEX = 7  # of the calibration among the operator's inputs
_ROWS = "calibrations"  # 1, or one for each sequence


class CalibrationInputPass(ir.passes.InPlacePass):
    """Adds the input `calibration` where there are heads to calibrate: (1 or batch, all such heads, 3), float32.

    Its initializer is the default calibration, so it needn't be given, and callers that don't know it get that one. One
    Split hands it to the layers: a request feeds one tensor, and so does an adapter.
    """

    def __init__(self, default: NDArray[np.float32]) -> None:
        """Takes the default's strengths, (1, heads, 3), heads in the order of the graph's nodes."""
        super().__init__()
        self.default = default

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the main graph, which must be sorted."""
        graph = model.graph
        nodes = [node for node in graph if node.domain == schema.DOMAIN and node.op_type == schema.CALIBRATED]
        if not nodes:
            return ir.passes.PassResult(model, modified=False)
        given = ir.Value(
            name=CALIBRATION,
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape([_ROWS, *self.default.shape[1:]]),
            const_value=ir.tensor(self.default, name=CALIBRATION),
        )
        graph.register_initializer(given)
        graph.inputs.append(given)
        counts = [len(node.attributes["calibrated_heads"].as_ints()) for node in nodes]
        parts = [given]
        if len(nodes) > 1:
            sizes = ir.Value(name=f"{CALIBRATION}_heads", const_value=ir.tensor(counts, name=f"{CALIBRATION}_heads"))
            graph.register_initializer(sizes)
            split = ir.node("Split", [given, sizes], {"axis": 1}, num_outputs=len(nodes))
            parts = list(split.outputs)
            for index, (part, count) in enumerate(zip(parts, counts, strict=True)):
                part.name, part.type, part.shape = f"{CALIBRATION}.{index}", given.type, ir.Shape([_ROWS, count, 3])
            graph.insert_before(graph[0], split)
        for node, part in zip(nodes, parts, strict=True):
            placeholder = node.inputs[_INDEX]
            node.replace_input_with(_INDEX, part)
            if placeholder is not None and placeholder.is_initializer() and not placeholder.uses():
                del graph.initializers[str(placeholder.name)]
        return ir.passes.PassResult(model, modified=True)
