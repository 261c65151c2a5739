"""A matrix product per expert."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from act_export.errors import ActExportError
from act_export.ops import schema

OPERATOR = "ExpertMatMul"


class UnrollExpertsPass(ir.passes.InPlacePass):
    """Turns each ExpertMatMul into Split, a MatMul per expert, and Concat.

    Rows come sorted by expert; the Split gives each expert its own, mostly none in a decode step, and a product of no
    rows reads no weights. An expert's matrix becomes an initializer of its own, which ONNX Runtime prepacks and the
    quantizer finds. It is cut from the weights of all experts when it is written.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the main graph.

        Raises:
            ActExportError: If weights are computed in the graph.
        """
        graph = model.graph
        nodes = [node for node in graph if node.domain == schema.DOMAIN and node.op_type == OPERATOR]
        matrices: dict[ir.Value, list[ir.Value]] = {}
        for node in nodes:
            weights = node.inputs[2]
            assert weights is not None  # the operator has no optional input
            if weights not in matrices:
                matrices[weights] = _matrices(graph, weights, bool(node.attributes.get_int("inputs_first", 0)))
            _unroll(graph, node, matrices[weights])
        for weights in matrices:
            if not weights.uses():
                del graph.initializers[str(weights.name)]
        return ir.passes.PassResult(model, modified=bool(nodes))


def _unroll(graph: ir.Graph, node: ir.Node, matrices: list[ir.Value]) -> None:
    rows, counts, product = node.inputs[0], node.inputs[1], node.outputs[0]
    assert rows is not None
    split = ir.node("Split", [rows, counts], {"axis": 0}, num_outputs=len(matrices))
    products = [ir.node("MatMul", [part, matrix]) for part, matrix in zip(split.outputs, matrices, strict=True)]
    concat = ir.node("Concat", [each.outputs[0] for each in products], {"axis": 0})
    for part, each, matrix in zip(split.outputs, products, matrices, strict=True):
        assert matrix.shape is not None  # by `_matrices`
        for value, size in ((part, matrix.shape[0]), (each.outputs[0], matrix.shape[1])):
            value.type, value.shape = rows.type, ir.Shape([None, size])
    joined = concat.outputs[0]
    joined.name, joined.type, joined.shape = product.name, product.type, product.shape
    graph.insert_before(node, [split, *products, concat])
    product.replace_all_uses_with(joined, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _matrices(graph: ir.Graph, weights: ir.Value, inputs_first: bool) -> list[ir.Value]:
    """(inputs, outputs) of each expert, as initializers."""
    if not weights.is_initializer() or weights.const_value is None:
        raise ActExportError(f"the experts' weights {weights.name} are computed, so they can't be stored apart")
    stack = _Stack(weights.const_value)
    made = []
    for expert in range(stack.experts):
        tensor = _matrix(stack, str(weights.name), expert, inputs_first)
        value = ir.Value(
            name=tensor.name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        graph.register_initializer(value)
        made.append(value)
    return made


class _Stack:
    """The weights of all experts, which are read for the first that is asked for and kept until all were."""

    def __init__(self, tensor: ir.TensorProtocol) -> None:
        self.dtype = tensor.dtype
        self.experts, *self.sizes = (int(size) for size in tensor.shape.numpy())
        self._tensor = tensor
        self._values: np.ndarray | None = None
        self._left: set[int] = set()

    def part(self, expert: int, *, transposed: bool) -> np.ndarray:
        """A copy of one expert's."""
        if self._values is None:
            self._values, self._left = self._tensor.numpy(), set(range(self.experts))
        part = self._values[expert]
        copy = np.array(part.T if transposed else part, order="C")
        self._left.discard(expert)
        if not self._left:
            self._values = None
        return copy


def _matrix(stack: _Stack, name: str, expert: int, inputs_first: bool) -> ir.TensorProtocol:
    """`a.experts.down_proj` -> `a.experts.7.down_proj.weight_transposed`, or `.weight` if it is stored as it was."""
    prefix, _, projection = name.rpartition(".")
    suffix = "weight" if inputs_first else "weight_transposed"
    stored = ".".join([*([prefix] if prefix else []), str(expert), projection, suffix])

    def matrix() -> ir.TensorProtocol:
        return ir.Tensor(stack.part(expert, transposed=not inputs_first), dtype=stack.dtype, name=stored)

    sizes = stack.sizes if inputs_first else stack.sizes[::-1]
    return ir.LazyTensor(matrix, dtype=stack.dtype, shape=ir.Shape(sizes), name=stored)
