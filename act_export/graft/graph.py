"""A graph to look things up in: who makes a value, who reads it, what it is."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import external_data_helper, helper, numpy_helper

from act_export.errors import ActExportError, others_errors, shortened, shown

_LARGEST_CONSTANT = 4096  # elements: scalars, shapes and permutations; weights aren't read


class Graph:
    """Look-ups over an `onnx.GraphProto`, which is not changed and must not change meanwhile.

    Attributes:
        proto: The graph.
        inputs: Graph inputs that a caller must give, by name.
        outputs: Graph outputs, by name.
        initializers: By name; their external data isn't loaded.
        opsets: Versions of the operators, as the model states them; needed to run parts of the graph.
    """

    def __init__(self, proto: onnx.GraphProto, opsets: Sequence[onnx.OperatorSetIdProto] = ()) -> None:
        """Indexes the graph."""
        self.proto = proto
        self.opsets = tuple(opsets)
        self.initializers: dict[str, onnx.TensorProto] = {tensor.name: tensor for tensor in proto.initializer}
        self.inputs = {given.name: given for given in proto.input if given.name not in self.initializers}
        self.outputs = {output.name: output for output in proto.output}
        self._infos = {**{info.name: info for info in proto.value_info}, **self.outputs, **self.inputs}
        self._producers: dict[str, onnx.NodeProto] = {}
        self._consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        self._positions: dict[int, int] = {}
        for position, node in enumerate(proto.node):
            self._positions[id(node)] = position
            for name in filter(None, node.output):
                self._producers[name] = node
            for name in filter(None, dict.fromkeys(node.input)):
                self._consumers[name].append(node)

    def producer(self, value: str) -> onnx.NodeProto | None:
        """The node that makes a value; None for inputs and initializers."""
        return self._producers.get(value)

    def consumers(self, value: str) -> list[onnx.NodeProto]:
        """The nodes that read a value."""
        return self._consumers.get(value, [])

    def position(self, node: onnx.NodeProto) -> int:
        """Index of a node of this graph."""
        return self._positions[id(node)]

    def element_type(self, value: str) -> int | None:
        """ONNX's number of a value's type; None where the graph doesn't say."""
        if value in self.initializers:
            return self.initializers[value].data_type
        info = self._infos.get(value)
        return info.type.tensor_type.elem_type if info is not None else None

    def shape(self, value: str) -> list[int | None] | None:
        """Dimensions, None for those without a number; None where the graph doesn't say."""
        if value in self.initializers:
            return list(self.initializers[value].dims)
        info = self._infos.get(value)
        if info is None or not info.type.tensor_type.HasField("shape"):
            return None
        return [dim.dim_value if dim.HasField("dim_value") else None for dim in info.type.tensor_type.shape.dim]

    def dimension_name(self, value: str, place: int) -> str | None:
        """What the graph calls a dimension; None where it is a number, or the graph doesn't say."""
        info = self._infos.get(value)
        dims = info.type.tensor_type.shape.dim if info is not None else ()
        return (dims[place].dim_param or None) if place < len(dims) else None

    def constant(self, value: str) -> NDArray[Any] | None:
        """A small constant's value, of an initializer or a Constant node; None for anything else."""
        tensor = self.initializers.get(value)
        node = self.producer(value)
        if tensor is None and node is not None and node.op_type == "Constant" and node.attribute:
            given = node.attribute[0]
            if given.name == "value":
                tensor = given.t
            elif given.name in ("value_int", "value_float", "value_ints", "value_floats"):
                return np.asarray(attribute(node, given.name))
        if tensor is None or external_data_helper.uses_external_data(tensor):
            return None
        if math.prod(tensor.dims) > _LARGEST_CONSTANT:
            return None
        with others_errors(f"the constant {shown(value)} can't be read", "export the model again"):
            return numpy_helper.to_array(tensor)

    def between(self, outputs: Sequence[str], cuts: Sequence[str]) -> tuple[list[onnx.NodeProto], list[str]]:
        """The nodes that compute values from others, in the graph's order, and what else they need.

        Args:
            outputs: Values to compute.
            cuts: Values that are given.

        Returns:
            The nodes, and the names of graph inputs and initializers that they read.
        """
        given, nodes, needed = set(cuts), dict[int, onnx.NodeProto](), dict[str, None]()
        waiting = [name for name in outputs if name not in given]
        while waiting:
            name = waiting.pop()
            node = self.producer(name)
            if node is None:
                if name not in self.inputs and name not in self.initializers:
                    raise ActExportError(f"nothing in the graph makes {name}; the model is damaged")
                needed[name] = None
            elif self.position(node) not in nodes:
                nodes[self.position(node)] = node
                waiting.extend(each for each in reads(node) if each not in given)
        return [nodes[position] for position in sorted(nodes)], list(needed)


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """An attribute's value; strings as str."""
    found = next((given for given in node.attribute if given.name == name), None)
    if found is None:
        return default
    what = f"{describe(node)} has an attribute {shown(name)} that can't be read"
    with others_errors(what, "export the model again"):
        value = helper.get_attribute_value(found)
        return value.decode("utf-8") if isinstance(value, bytes) else value


def describe(node: onnx.NodeProto) -> str:
    """A node as errors name it."""
    kind = shortened(f"{node.domain}.{node.op_type}" if node.domain else node.op_type, 100)
    return f"{kind} {shown(node.name)}" if node.name else f"{kind} that makes {shown(next(iter(node.output), ''))}"


def reads(node: onnx.NodeProto) -> list[str]:
    """Values that a node needs, those of its subgraphs included."""
    names = [name for name in node.input if name]
    for given in node.attribute:
        if given.type == onnx.AttributeProto.GRAPH:
            inner = given.g
            own = {tensor.name for tensor in inner.initializer} | {info.name for info in inner.input}
            for each in inner.node:
                names += [name for name in reads(each) if name not in own]
                own.update(each.output)
            names += [output.name for output in inner.output if output.name not in own]
    return names


class UnsupportedPatternError(ActExportError):
    """An attention that the operator can't stand in for; the message names the node."""
