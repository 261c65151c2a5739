"""A node in another's place."""

from __future__ import annotations

import onnx_ir as ir


def replace_node(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    """Puts a new node with one output in the place of one; its output keeps name, type and shape."""
    before, after = old.outputs[0], new.outputs[0]
    name, after.type, after.shape = before.name, before.type, before.shape
    new.metadata_props.update(old.metadata_props)
    graph.insert_before(old, new)
    before.replace_all_uses_with(after, replace_graph_outputs=True)
    graph.remove(old, safe=True)
    after.name = name
