"""Constants of a graph, read and made. Weights may be lazy and large: their values are read only when written."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

_FEW = 1024


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer that no caller can override; None for anything else."""
    if value is None or not value.is_initializer() or value.is_graph_input():
        return None
    return value.const_value


def sizes(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """Its shape."""
    return tuple(int(size) for size in tensor.shape.numpy())


def few_numbers(value: ir.Value | None) -> np.ndarray | None:
    """The values of a small constant, such as a shape, an axis or a factor; None for anything else."""
    tensor = constant(value)
    return None if tensor is None or tensor.size > _FEW else tensor.numpy()


def single_number(value: ir.Value | None) -> float | None:
    """The value of a constant of one element; None for anything else."""
    numbers = few_numbers(value)
    return None if numbers is None or numbers.size != 1 else float(numbers.reshape(()))


def is_at_most_vector(value: ir.Value | None) -> bool:
    """Whether a value is a constant that is the same for all positions and heads: a number, or a vector."""
    tensor = constant(value)
    return tensor is not None and (len(tensor.shape) <= 1 or tensor.size == 1)


def lazily(
    tensor: ir.TensorProtocol, change: Callable[[np.ndarray], np.ndarray], shape: Sequence[int], name: str
) -> ir.LazyTensor:
    """A tensor that is made of another when somebody asks for its values."""

    def values() -> ir.TensorProtocol:
        return ir.Tensor(change(tensor.numpy()), dtype=tensor.dtype, name=name)

    return ir.LazyTensor(values, dtype=tensor.dtype, shape=ir.Shape(shape), name=name)


def register(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """A new initializer under the tensor's name, which must be free."""
    value = ir.Value(
        name=tensor.name, shape=ir.Shape(sizes(tensor)), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def integers(graph: ir.Graph, purpose: str, numbers: Sequence[int]) -> ir.Value:
    """An int64 vector, one initializer for all that ask for the same numbers for the same purpose."""
    name = "_".join([purpose, *map(str, numbers)])
    if name not in graph.initializers:
        return register(graph, ir.tensor(list(numbers), dtype=ir.DataType.INT64, name=name))
    return graph.initializers[name]
