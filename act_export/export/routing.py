"""Where a graph chooses experts."""

from __future__ import annotations

import onnx_ir as ir

_PRODUCTS = {"Gemm", "MatMul"}
_NORMS = {"LayerNormalization", "RMSNormalization"}


def routing_nodes(graph: ir.Graph) -> set[ir.Node]:
    """The nodes that make the scores by which each token's experts are chosen.

    From each TopK of floats back to the product with the router's weights, which is one of them. A rounding of these
    scores can choose another expert, and the product is small.
    """
    found: set[ir.Node] = set()
    pending = [node for node in graph if _chooses(node)]
    while pending:
        for value in pending.pop().inputs:
            node = value.producer() if value is not None and value.dtype == ir.DataType.FLOAT else None
            if node is None or node in found or node.domain != "" or node.op_type in _NORMS:
                continue
            found.add(node)
            if node.op_type not in _PRODUCTS:
                pending.append(node)
    return found


def _chooses(node: ir.Node) -> bool:
    scores = node.inputs[0] if node.op_type == "TopK" and node.domain == "" else None
    return scores is not None and scores.dtype == ir.DataType.FLOAT
