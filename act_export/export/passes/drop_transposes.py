"""Attention's inputs computed as (batch, sequence, heads, head size), without transposing them to and fro."""

from __future__ import annotations

import onnx_ir as ir

from act_export.export.passes.initializers import few_numbers, integers, is_at_most_vector
from act_export.export.passes.shapes import dims, give, rank
from act_export.export.passes.stretches import BINARY, ELEMENTWISE, NORMS, Layout, leave

_SWAP = (0, 2, 1, 3)
_AXES = {1: 2, -3: 2, 3: 3, -1: 3}  # of heads and of what is in a head, before and after


class DropTransposesPass(ir.passes.InPlacePass):
    """Removes Transpose before and after norms, rotary embeddings and slices of a head.

    transformers computes these on (batch, heads, sequence, head size), but the attention operator takes
    (batch, sequence, heads * head size), and so does RotaryEmbedding. The reshapes that remain mostly meet others and
    cancel (`CancelReshapesPass`). A stretch with an operator for which the order of axes matters, or with a result that
    something else takes in the old order, is left alone.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites every match in the main graph."""
        graph = model.graph
        closed = [node for node in graph if _swaps(node) and _swaps(_producer_of_input(node))]
        changed = leave(graph, Layout(opens=_swaps, closes=_swaps, carries=_carries))
        for node in changed:
            for output in node.outputs:
                output.shape = ir.Shape([dims(output)[axis] for axis in _SWAP])
            if node.op_type in ("Concat", "Split"):
                axis = _AXES[node.attributes["axis"].as_int()]
                node.attributes["axis"] = ir.AttrInt64("axis", axis)
            if node.op_type == "RotaryEmbedding":
                _flatten(graph, node)
        return ir.passes.PassResult(model, modified=bool(changed or closed))


def _swaps(node: ir.Node | None) -> bool:
    return (
        node is not None
        and node.op_type == "Transpose"
        and node.domain == ""
        and node.inputs[0] is not None
        and tuple(node.attributes.get_ints("perm", ())) == _SWAP
    )


def _producer_of_input(node: ir.Node) -> ir.Node | None:
    return None if node.inputs[0] is None else node.inputs[0].producer()


def _carries(node: ir.Node) -> list[ir.Value]:
    inputs = [value for value in node.inputs if value is not None]
    used = [value for value in node.outputs if value.uses()]
    if node.domain != "" or not all(rank(value) == len(_SWAP) for value in (*inputs[:1], *node.outputs)):
        return []
    if node.op_type in ELEMENTWISE:
        return inputs
    if node.op_type in BINARY:
        rows = [value for value in inputs if not is_at_most_vector(value)]
        return rows if all(rank(value) == len(_SWAP) for value in rows) else []
    if node.op_type in NORMS:
        along = node.attributes.get_int("axis", -1) in (-1, 3)
        fits = along and all(is_at_most_vector(value) for value in inputs[1:]) and used == list(node.outputs[:1])
        return inputs[:1] if fits else []
    if node.op_type == "Slice":
        axes = few_numbers(node.inputs[3]) if len(node.inputs) > 3 else None
        return inputs[:1] if axes is not None and axes.tolist() in ([3], [-1]) else []
    if node.op_type == "Split":
        return inputs[:1] if node.attributes.get_int("axis", 0) in _AXES else []
    if node.op_type == "Concat":
        ranks = {rank(value) for value in inputs}
        return inputs if node.attributes["axis"].as_int() in _AXES and ranks == {len(_SWAP)} else []
    return inputs[:1] if node.op_type == "RotaryEmbedding" and _has_known_heads(node) else []


def _has_known_heads(rotary: ir.Node) -> bool:
    """Whether heads and head size are known numbers, of (batch, heads, sequence, head size)."""
    sizes = dims(rotary.inputs[0])
    return len(sizes) == len(_SWAP) and isinstance(sizes[1], int) and isinstance(sizes[3], int)


def _flatten(graph: ir.Graph, rotary: ir.Node) -> None:
    """Reshapes what goes into a rotary embedding, and what comes of it, whose shape is that of the outer layout."""
    x, whole = rotary.inputs[0], rotary.outputs[0]
    batch, sequence, heads, head_size = dims(whole)
    assert isinstance(heads, int)  # by `_has_known_heads`
    assert isinstance(head_size, int)
    hidden = heads * head_size
    attributes = {**rotary.attributes, "num_heads": ir.AttrInt64("num_heads", heads)}
    flat = ir.node("Reshape", [x, integers(graph, "shape", [0, 0, hidden])])
    rotated = ir.node("RotaryEmbedding", [flat.outputs[0], *rotary.inputs[1:]], attributes)
    split = ir.node("Reshape", [rotated.outputs[0], integers(graph, "shape", [0, 0, heads, head_size])])
    for node in (flat, rotated):
        give(node, whole, (batch, sequence, hidden))
    graph.insert_before(rotary, [flat, rotated, give(split, whole, dims(whole))])
    whole.replace_all_uses_with(split.outputs[0])
    graph.remove(rotary, safe=True)
