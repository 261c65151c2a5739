"""RotaryEmbedding on (batch, sequence, hidden) instead of a transposed 4-D tensor."""

from __future__ import annotations

import onnx_ir as ir

_SWAP = (0, 2, 1, 3)


class FlattenRotaryPass(ir.passes.InPlacePass):
    """Replaces Transpose -> RotaryEmbedding -> Transpose by Reshape -> RotaryEmbedding -> Reshape.

    The operator takes (batch, heads, sequence, head_size), or (batch, sequence, heads * head_size) with the number of
    heads as attribute. The second form needs no transposition; the reshapes mostly meet others and cancel
    (`CancelReshapesPass`). A rotary embedding that has another consumer than one transposition is left alone.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites every match in the main graph."""
        shapes: dict[tuple[int, ...], ir.Value] = {}
        modified = False
        for node in list(model.graph):
            if node.op_type == "RotaryEmbedding" and node.domain == "":
                modified |= _flatten(model.graph, node, shapes)
        return ir.passes.PassResult(model, modified)


def _flatten(graph: ir.Graph, rotary: ir.Node, shapes: dict[tuple[int, ...], ir.Value]) -> bool:
    before = rotary.inputs[0].producer() if rotary.inputs[0] is not None else None
    uses = list(rotary.outputs[0].uses())
    if before is None or len(uses) != 1 or not _swaps_heads(before) or not _swaps_heads(uses[0][0]):
        return False
    after = uses[0][0]
    x, out = before.inputs[0], after.outputs[0]
    if x is None or x.shape is None:
        return False
    batch, sequence, heads, head_size = x.shape
    if not isinstance(heads, int) or not isinstance(head_size, int):
        return False
    flat = ir.node("Reshape", [x, _shape(graph, (0, 0, heads * head_size), shapes)])
    flat.outputs[0].shape = ir.Shape([batch, sequence, heads * head_size])
    rotated = ir.node(
        "RotaryEmbedding",
        [flat.outputs[0], *rotary.inputs[1:]],
        attributes={
            **{name: attribute for name, attribute in rotary.attributes.items() if name != "num_heads"},
            "num_heads": ir.AttrInt64("num_heads", heads),
        },
    )
    rotated.outputs[0].shape = flat.outputs[0].shape.copy()
    split = ir.node("Reshape", [rotated.outputs[0], _shape(graph, (0, 0, heads, head_size), shapes)])
    split.outputs[0].shape = ir.Shape([batch, sequence, heads, head_size])
    for new in (flat, rotated, split):
        new.outputs[0].type = x.type
    graph.insert_before(rotary, [flat, rotated, split])
    out.replace_all_uses_with(split.outputs[0])
    graph.remove([after, rotary], safe=True)
    if not before.outputs[0].uses():
        graph.remove(before, safe=True)
    return True


def _swaps_heads(node: ir.Node) -> bool:
    return (
        node.op_type == "Transpose"
        and node.domain == ""
        and "perm" in node.attributes
        and tuple(node.attributes["perm"].as_ints()) == _SWAP
    )


def _shape(graph: ir.Graph, dims: tuple[int, ...], shapes: dict[tuple[int, ...], ir.Value]) -> ir.Value:
    if dims not in shapes:
        name = "shape_" + "_".join(map(str, dims))
        value = ir.Value(
            name=name,
            shape=ir.Shape([len(dims)]),
            type=ir.TensorType(ir.DataType.INT64),
            const_value=ir.tensor(list(dims), dtype=ir.DataType.INT64, name=name),
        )
        graph.register_initializer(value)
        shapes[dims] = value
    return shapes[dims]
