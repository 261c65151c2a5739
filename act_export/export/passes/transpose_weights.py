"""Weights stored the way that products want them."""

from __future__ import annotations

import onnx_ir as ir
import torch


class TransposeWeightsPass(ir.passes.InPlacePass):
    """Replaces the transposition of a weight by a weight that is transposed when it is written.

    torch's optimizer does the same, but copies the weight. As there, a weight that something else uses too, such as a
    tied embedding, is left alone: it would be stored twice.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites every match in the main graph."""
        graph, modified = model.graph, False
        for node in list(graph):
            if node.op_type != "Transpose" or node.domain != "" or node.outputs[0].is_graph_output():
                continue
            weight = node.inputs[0]
            if weight is not None and _is_of_this_alone(weight):
                _transpose(graph, node, weight)
                modified = True
        return ir.passes.PassResult(model, modified)


def _is_of_this_alone(value: ir.Value) -> bool:
    constant = value.is_initializer() and not value.is_graph_input() and not value.is_graph_output()
    return constant and value.const_value is not None and len(value.uses()) == 1


def _transpose(graph: ir.Graph, node: ir.Node, weight: ir.Value) -> None:
    assert weight.const_value is not None  # by `_is_of_this_alone`
    result = node.outputs[0]
    sizes = [int(size) for size in weight.const_value.shape.numpy()]
    order = list(node.attributes.get_ints("perm") or reversed(range(len(sizes))))
    tensor = _transposed(weight.const_value, order, [sizes[axis] for axis in order], str(result.name))
    stored = ir.Value(
        name=result.name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    result.replace_all_uses_with(stored)
    graph.remove(node, safe=True)
    del graph.initializers[str(weight.name)]
    graph.register_initializer(stored)


def _transposed(tensor: ir.TensorProtocol, order: list[int], sizes: list[int], name: str) -> ir.TensorProtocol:
    def values() -> ir.TensorProtocol:
        # torch takes a third of the time that numpy takes to lay a large matrix out anew
        transposed = torch.from_numpy(tensor.numpy()).permute(order).contiguous()
        return ir.Tensor(transposed.numpy(), dtype=tensor.dtype, name=name)

    return ir.LazyTensor(values, dtype=tensor.dtype, shape=ir.Shape(sizes), name=name)
