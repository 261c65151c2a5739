"""One matrix product for query, key and value."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

_LEAST = 3  # two products of the same input, such as the gate and up projections of an MLP, gain nothing: measured


class PackProjectionsPass(ir.passes.InPlacePass):
    """Turns three or more MatMuls of the same input by weights into one MatMul and a Split.

    A decode step reads every weight once and computes little: fewer, larger products take less time. Biases that all of
    them have are packed too. Left alone: weights that something else uses, that aren't matrices, or that a caller may
    override. The packed matrix is made when it is written, so that no two copies are in memory.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites every match in the main graph."""
        by_input: dict[ir.Value, list[_Projection]] = {}
        for node in model.graph:
            projection = _projection(node)
            if projection is not None:
                by_input.setdefault(projection.source, []).append(projection)
        groups = [group for group in by_input.values() if len(group) >= _LEAST]
        for group in groups:
            _pack(model.graph, group)
        return ir.passes.PassResult(model, modified=bool(groups))


@dataclass(frozen=True)
class _Constant:
    name: str
    tensor: ir.TensorProtocol
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class _Projection:
    """A MatMul by a weight, and the Add of its bias if there is one."""

    source: ir.Value
    product: ir.Node
    weight: _Constant
    add: ir.Node | None = None
    bias: _Constant | None = None

    @property
    def nodes(self) -> list[ir.Node]:
        return [self.product] if self.add is None else [self.product, self.add]

    @property
    def result(self) -> ir.Value:
        return self.nodes[-1].outputs[0]


def _constant(value: ir.Value | None, rank: int) -> _Constant | None:
    """The value's constant, unless it has another rank, another user, or may be overridden."""
    if value is None or value.const_value is None or not value.is_initializer() or value.is_graph_input():
        return None
    sizes = tuple(int(size) for size in value.const_value.shape.numpy())
    if len(sizes) != rank or len(value.uses()) != 1:
        return None
    return _Constant(str(value.name), value.const_value, sizes)


def _projection(node: ir.Node) -> _Projection | None:
    if node.op_type != "MatMul" or node.inputs[0] is None or node.outputs[0].is_graph_output():
        return None
    weight = _constant(node.inputs[1], rank=2)
    if weight is None:
        return None
    users = [use.node for use in node.outputs[0].uses()]
    if len(users) == 1 and users[0].op_type == "Add" and not users[0].outputs[0].is_graph_output():
        for value in users[0].inputs:
            bias = _constant(value, rank=1)
            if bias is not None and bias.sizes == weight.sizes[1:]:
                return _Projection(node.inputs[0], node, weight, users[0], bias)
    return _Projection(node.inputs[0], node, weight)


def _pack(graph: ir.Graph, group: Sequence[_Projection]) -> None:
    biases = [projection.bias for projection in group if projection.bias is not None]
    with_bias = len(biases) == len(group)
    if not with_bias:
        group = [_Projection(projection.source, projection.product, projection.weight) for projection in group]
    weights = [projection.weight for projection in group]
    nodes = [ir.node("MatMul", [group[0].source, _register(graph, _join(weights, axis=1))])]
    if with_bias:
        nodes.append(ir.node("Add", [nodes[0].outputs[0], _register(graph, _join(biases, axis=0))]))
    sizes = np.array([weight.sizes[1] for weight in weights], np.int64)
    sizes_name = f"{_common_name([weight.name for weight in weights])}.sizes"
    parts = [ir.Value(shape=projection.result.shape, type=projection.result.type) for projection in group]
    for node in nodes:
        node.outputs[0].type = group[0].source.type
    split_inputs = [nodes[-1].outputs[0], _register(graph, ir.tensor(sizes, name=sizes_name))]
    nodes.append(ir.node("Split", split_inputs, {"axis": -1}, outputs=parts))
    graph.insert_before(group[0].product, nodes)
    for projection, part in zip(group, parts, strict=True):
        projection.result.replace_all_uses_with(part)
    graph.remove([node for projection in group for node in projection.nodes], safe=True)
    for constant in [*weights, *(biases if with_bias else [])]:
        del graph.initializers[constant.name]


def _join(parts: Sequence[_Constant], axis: int) -> ir.TensorProtocol:
    dtype = parts[0].tensor.dtype
    sizes = list(parts[0].sizes)
    sizes[axis] = sum(part.sizes[axis] for part in parts)

    def join() -> ir.TensorProtocol:
        return ir.Tensor(np.concatenate([part.tensor.numpy() for part in parts], axis), dtype=dtype)

    return ir.LazyTensor(join, dtype=dtype, shape=ir.Shape(sizes), name=_common_name([part.name for part in parts]))


def _register(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(
        name=tensor.name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _common_name(names: Sequence[str]) -> str:
    """`a.q.weight`, `a.k.weight` -> `a.q+k.weight`; what the names don't share is joined."""
    split = [name.split(".") for name in names]
    prefix = _common_start(split)
    rest = [parts[len(prefix) :] for parts in split]
    suffix = _common_start([parts[::-1] for parts in rest])[::-1]
    middles = [".".join(parts[: len(parts) - len(suffix)]) for parts in rest]
    return ".".join([*prefix, "+".join(middles), *suffix])


def _common_start(lists: Sequence[list[str]]) -> list[str]:
    same = itertools.takewhile(lambda items: len(set(items)) == 1, zip(*lists, strict=False))
    return [items[0] for items in same]
