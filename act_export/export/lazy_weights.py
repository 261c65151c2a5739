"""Weights that take no memory while a model is traced, and are read one at a time when the file is written."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import onnx_ir as ir
from torch import Tensor, nn

from act_export.checkpoint.streamed.hollow_tensors import hollow_tensors, is_large

ReadWeight = Callable[[str], Tensor]
"""Gives a parameter in float32, by any of its names."""

_SOURCE = "act_export.weights"  # in a model's `meta`


@contextmanager
def hollowed(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Takes the large parameters out of a model for the duration of the block; zeros stand for them.

    Yields:
        What was taken out, by each name that it has: tied weights have several.
    """
    large = {id(parameter): parameter for parameter in model.parameters() if is_large(parameter.shape)}
    named = model.named_parameters(remove_duplicate=False)
    by_name = {name: parameter.data for name, parameter in named if id(parameter) in large}
    zeros = hollow_tensors(parameter.shape for parameter in large.values())
    stand_ins = {key: nn.Parameter(each, requires_grad=False) for key, each in zip(large, zeros, strict=True)}
    places = [
        (module, leaf, parameter)
        for module in model.modules()
        for leaf, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in large
    ]
    try:
        for module, leaf, parameter in places:
            module._parameters[leaf] = stand_ins[id(parameter)]
        yield by_name
    finally:
        for module, leaf, parameter in places:
            module._parameters[leaf] = parameter


def attach_weights(model: ir.Model, names: Collection[str], read: ReadWeight, *, prefix: str) -> None:
    """Gives initializers their values, to be read when they are needed and not kept.

    Args:
        model: An exported graph, whose initializers are called as the parameters, after a prefix; changed in place.
        names: Of the parameters to attach; others stay as they are.
        read: How to get one.
        prefix: In front of a parameter's name, e.g. "model.".
    """
    source = model.meta[_SOURCE] = _Source(read)
    for value in model.graph.initializers.values():
        name = str(value.name).removeprefix(prefix)
        if name in names and value.const_value is not None:
            value.const_value = _lazy(name, value.const_value, source)


def forget_weights(model: ir.Model) -> None:
    """Lets go of the weights that were attached to a graph, which is written and of no use any more.

    onnxscript's rewriter keeps the last graph that it has seen, and with it they would stay in memory.
    """
    source = model.meta.get(_SOURCE)
    if source is not None:
        source.read = None


class _Source:
    """Where attached weights are read, until they are forgotten."""

    def __init__(self, read: ReadWeight) -> None:
        self.read: ReadWeight | None = read

    def __call__(self, name: str) -> Tensor:
        if self.read is None:
            raise RuntimeError(f"the graph is written, and its weight {name} can't be read any more")
        return self.read(name)


def _lazy(name: str, stand_in: ir.TensorProtocol, read: ReadWeight) -> ir.TensorProtocol:
    dtype, shape, stored = stand_in.dtype, ir.Shape(stand_in.shape.numpy()), stand_in.name

    def values() -> ir.TensorProtocol:
        return ir.Tensor(read(name).detach().numpy(), dtype=dtype, name=stored)

    return ir.LazyTensor(values, dtype=dtype, shape=shape, name=stored)
