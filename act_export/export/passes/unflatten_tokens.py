"""Linear layers on (batch, sequence, width) instead of (tokens, width)."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from act_export.export.passes.initializers import constant, is_at_most_vector, lazily, register, sizes
from act_export.export.passes.shapes import Size, dims, give, rank, width
from act_export.export.passes.stretches import BINARY, ELEMENTWISE, NORMS, Layout, leave

_Tokens = tuple[Size, Size]  # batch and sequence


class UnflattenTokensPass(ir.passes.InPlacePass):
    """Removes Reshape to (tokens, width) and back around linear layers, and turns their Gemm into MatMul and Add.

    transformers flattens the tokens around the linear layers of GPT-2 and OPT. In one layout for all layers, products
    can be packed (`PackProjectionsPass`) and the last layer can run on the last position alone (`KeepLastLogitsPass`).
    A stretch with an operator that mixes tokens, or with a Gemm of another form, is left alone.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites every match in the main graph."""
        graph, modified = model.graph, False
        for tokens in dict.fromkeys(found for node in graph if (found := _flattened(node)) is not None):
            changed = leave(graph, _layout(tokens))
            for node in changed:
                for output in node.outputs:
                    output.shape = ir.Shape([*tokens, dims(output)[1]])
                if node.op_type in NORMS:
                    node.attributes["axis"] = ir.AttrInt64("axis", -1)
                if node.op_type == "Gemm":
                    _multiply_and_add(graph, node)
            modified |= bool(changed)
        return ir.passes.PassResult(model, modified)


def _layout(tokens: _Tokens) -> Layout:
    return Layout(lambda node: _flattened(node) == tokens, lambda node: _unflattened(node) == tokens, _carries)


def _flattened(node: ir.Node) -> _Tokens | None:
    """(batch, sequence) of a Reshape that turns (batch, sequence, width) into (tokens, width)."""
    if not _is_reshape(node, from_rank=3, to_rank=2):
        return None
    batch, sequence, _ = dims(node.inputs[0])
    return batch, sequence


def _unflattened(node: ir.Node) -> _Tokens | None:
    """(batch, sequence) of a Reshape that turns (tokens, width) into (batch, sequence, width)."""
    if not _is_reshape(node, from_rank=2, to_rank=3):
        return None
    batch, sequence, _ = dims(node.outputs[0])
    return batch, sequence


def _is_reshape(node: ir.Node, *, from_rank: int, to_rank: int) -> bool:
    """Whether a node is a Reshape that keeps the last axis, between these ranks and known shapes."""
    if node.op_type != "Reshape" or node.domain != "":
        return False
    before, after = node.inputs[0], node.outputs[0]
    fits = (rank(before), rank(after)) == (from_rank, to_rank) and 0 < width(before) == width(after)
    return fits and ir.SymbolicDim(None) not in (*dims(before), *dims(after))


def _carries(node: ir.Node) -> list[ir.Value]:
    inputs = [value for value in node.inputs if value is not None]
    if node.domain != "" or not all(rank(value) == 2 for value in (*inputs[:1], *node.outputs)):
        return []
    if node.op_type in ELEMENTWISE:
        return inputs
    if node.op_type in BINARY:
        rows = [value for value in inputs if not is_at_most_vector(value)]
        return rows if all(rank(value) == 2 for value in rows) else []
    if node.op_type in NORMS:
        along = node.attributes.get_int("axis", -1) in (-1, 1)
        return inputs[:1] if along and all(is_at_most_vector(value) for value in inputs[1:]) else []
    if node.op_type == "MatMul":
        return inputs[:1] if _is_matrix(inputs[1]) else []
    return inputs[:1] if node.op_type == "Gemm" and _is_linear(node) else []


def _is_matrix(value: ir.Value | None) -> bool:
    tensor = constant(value)
    return tensor is not None and len(tensor.shape) == 2


def _is_linear(gemm: ir.Node) -> bool:
    attributes = gemm.attributes
    plain = attributes.get_float("alpha", 1.0) == 1 and attributes.get_float("beta", 1.0) == 1
    bias = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    fits = _is_matrix(gemm.inputs[1]) and (bias is None or is_at_most_vector(bias))
    return plain and fits and not attributes.get_int("transA", 0)


def _multiply_and_add(graph: ir.Graph, gemm: ir.Node) -> None:
    weight, result = gemm.inputs[1], gemm.outputs[0]
    bias = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    assert weight is not None  # by `_is_linear`
    if gemm.attributes.get_int("transB", 0):
        weight = _transposed(graph, weight, gemm)
    nodes = [ir.node("MatMul", [gemm.inputs[0], weight])]
    if bias is not None:
        nodes.append(ir.node("Add", [nodes[0].outputs[0], bias]))
    for node in nodes:
        node.metadata_props.update(gemm.metadata_props)
        give(node, result, dims(result))
    graph.insert_before(gemm, nodes)
    result.replace_all_uses_with(nodes[-1].outputs[0])
    graph.remove(gemm, safe=True)


def _transposed(graph: ir.Graph, weight: ir.Value, gemm: ir.Node) -> ir.Value:
    """The weight the way that MatMul wants it; one that something else uses too is transposed by the graph."""
    tensor = constant(weight)
    assert tensor is not None  # by `_is_linear`
    shape = sizes(tensor)[::-1]
    if len(weight.uses()) > 1:
        node = give(ir.node("Transpose", [weight], {"perm": [1, 0]}), weight, shape)
        graph.insert_before(gemm, node)
        return node.outputs[0]
    stored = register(graph, lazily(tensor, np.transpose, shape, f"{weight.name}_transposed"))
    gemm.replace_input_with(1, stored)
    del graph.initializers[str(weight.name)]
    return stored
