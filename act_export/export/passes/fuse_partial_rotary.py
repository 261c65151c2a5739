"""One RotaryEmbedding where only a part of each head is rotated."""

from __future__ import annotations

import onnx_ir as ir

from act_export.export.passes.columns import columns_of
from act_export.export.passes.initializers import integers
from act_export.export.passes.shapes import dims, give, is_last_axis, rank, width

_ROTATED = "rotary_embedding_dim"


class FusePartialRotaryPass(ir.passes.InPlacePass):
    """Turns Concat(RotaryEmbedding(first columns of x), its others) into RotaryEmbedding(x, rotary_embedding_dim=..).

    x is (batch, sequence, heads, head size), as `DropTransposesPass` leaves it. Left alone: rotations of other than the
    first columns, and parts that don't make up x.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites every match in the main graph."""
        graph, modified = model.graph, False
        for node in list(graph):
            if node.op_type == "Concat" and node.domain == "" and not node.outputs[0].is_graph_output():
                modified |= _fuse(graph, node)
        return ir.passes.PassResult(model, modified)


def _fuse(graph: ir.Graph, concat: ir.Node) -> bool:
    whole = concat.outputs[0]
    if len(concat.inputs) != 2 or not is_last_axis(concat.attributes["axis"].as_int(), whole):
        return False
    rotary, part = _rotation(concat.inputs[0])
    first = None if part is None else columns_of(part)
    others = None if concat.inputs[1] is None else columns_of(concat.inputs[1])
    if rotary is None or first is None or others is None or first.source is not others.source:
        return False
    x, rotated = first.source, len(first.taken)
    if rank(x) != 4 or first.taken != range(rotated) or others.taken != range(rotated, width(x)):
        return False
    batch, sequence, heads, _ = dims(x)
    assert isinstance(heads, int)  # by `_rotation`
    hidden = heads * width(x)
    attributes = {**rotary.attributes, _ROTATED: ir.AttrInt64(_ROTATED, rotated)}
    flat = ir.node("Reshape", [x, integers(graph, "shape", [0, 0, hidden])])
    fused = ir.node("RotaryEmbedding", [flat.outputs[0], *rotary.inputs[1:]], attributes)
    split = ir.node("Reshape", [fused.outputs[0], integers(graph, "shape", [0, 0, heads, width(x)])])
    for node in (flat, fused):
        give(node, x, (batch, sequence, hidden))
    graph.insert_before(concat, [flat, fused, give(split, x, dims(x))])
    whole.replace_all_uses_with(split.outputs[0])
    return True


def _rotation(value: ir.Value | None) -> tuple[ir.Node | None, ir.Value | None]:
    """The RotaryEmbedding that a value (batch, sequence, heads, size) comes from, and what it rotates, as a whole."""
    nothing = None, None
    rotary = _before_reshape(value)
    rotary_node = None if rotary is None else rotary.producer()
    if rotary_node is None or rotary_node.op_type != "RotaryEmbedding" or rotary_node.domain != "":
        return nothing
    part = _before_reshape(rotary_node.inputs[0])
    if rank(part) != 4 or dims(part) != dims(value):
        return nothing
    heads, rotated = rotary_node.attributes.get_int("num_heads", 0), rotary_node.attributes.get_int(_ROTATED, 0)
    return (rotary_node, part) if heads == dims(part)[2] and rotated in (0, width(part)) else nothing


def _before_reshape(value: ir.Value | None) -> ir.Value | None:
    node = None if value is None else value.producer()
    return node.inputs[0] if node is not None and node.op_type == "Reshape" and node.domain == "" else None
