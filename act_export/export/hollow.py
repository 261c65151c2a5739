"""Weights that take no memory while a model is traced, and are read one at a time when the file is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch import nn

ReadWeight = Callable[[str], Tensor]
"""Gives a parameter in float32, by any of its names."""

_SMALL = 1024  # numbers; torch's optimizer looks at the values of constants up to this size


def is_large(shape: Sequence[int]) -> bool:
    """Whether a parameter is a matrix of some size; norms, biases and other small ones keep their values."""
    return len(shape) > 1 and math.prod(shape) > _SMALL


def hollow_tensors(shapes: Iterable[Sequence[int]]) -> list[Tensor]:
    """Zeros in float32 of these shapes, in one memory that the system needn't provide as long as nothing is written.

    They are for looking at, never to be changed: all of them are views of the same numbers.
    """
    shapes = list(shapes)
    numbers = torch.from_numpy(np.zeros(max(map(math.prod, shapes), default=0), np.float32))
    return [numbers[: math.prod(shape)].view(tuple(shape)) for shape in shapes]


@contextmanager
def hollowed(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Takes the large parameters out of a model for the duration of the block; zeros stand for them.

    Yields:
        What was taken out, by each name that it has: tied weights have several.
    """
    large = {id(parameter): parameter for parameter in model.parameters() if is_large(parameter.shape)}
    taken = {key: parameter.data for key, parameter in large.items()}
    named = model.named_parameters(remove_duplicate=False)
    by_name = {name: taken[id(parameter)] for name, parameter in named if id(parameter) in taken}
    zeros = hollow_tensors(parameter.shape for parameter in large.values())
    try:
        for parameter, stand_in in zip(large.values(), zeros, strict=True):
            parameter.data = stand_in
        yield by_name
    finally:
        for key, parameter in large.items():
            parameter.data = taken[key]


def attach_weights(model: ir.Model, names: Collection[str], read: ReadWeight, *, prefix: str) -> None:
    """Gives initializers their values, to be read when they are needed and not kept.

    Args:
        model: An exported graph, whose initializers are called as the parameters, after a prefix; changed in place.
        names: Of the parameters to attach; others stay as they are.
        read: How to get one.
        prefix: In front of a parameter's name, e.g. "model.".
    """
    for value in model.graph.initializers.values():
        name = str(value.name).removeprefix(prefix)
        if name in names and value.const_value is not None:
            value.const_value = _lazy(name, value.const_value, read)


def _lazy(name: str, stand_in: ir.TensorProtocol, read: ReadWeight) -> ir.TensorProtocol:
    def values() -> ir.TensorProtocol:
        return ir.Tensor(read(name).detach().numpy(), dtype=stand_in.dtype, name=stand_in.name)

    shape = ir.Shape(stand_in.shape.numpy())
    return ir.LazyTensor(values, dtype=stand_in.dtype, shape=shape, name=stand_in.name)
