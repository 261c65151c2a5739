"""Inputs, outputs and files of an ONNX model, read off its graph: what a server's configuration has to repeat."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from act_export.errors import ActExportError
from act_export.onnx_file.external_data import data_files
from act_export.onnx_file.load import load_without_weights, model_file
from act_export.ops import schema

_INITIALIZERS_ARE_NO_DEFAULTS = 3  # IR versions up to this one list every weight among the inputs


class HostError(ActExportError):
    """A model that can't be served, or can't be written where it was asked for."""


@dataclass(frozen=True)
class Tensor:
    """An input or output.

    Attributes:
        name: In the graph.
        element_type: A value of `onnx.TensorProto.DataType`.
        shape: Dimensions, None for those that vary; () for a scalar.
        optional: Whether the graph has a default for it.
    """

    name: str
    element_type: int
    shape: tuple[int | None, ...]
    optional: bool = False


@dataclass(frozen=True)
class Signature:
    """What a host has to know of a model.

    Attributes:
        path: The ONNX file.
        inputs: In the graph's order; of those with a default only the ones that hold a single number, which are
            settings and no weights.
        outputs: In the graph's order.
        data: Files beside it that hold its weights, by their names in the graph.
        uses_library: Whether it has operators that the native library can run.
    """

    path: Path
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    data: tuple[str, ...]
    uses_library: bool


def read_signature(path: str | os.PathLike[str]) -> Signature:
    """Reads the graph of a file, or of `model.onnx` of a folder; weights beside it are looked for and not read.

    Raises:
        HostError: If it isn't an ONNX file, an input or output is no tensor of known rank, or weights are missing.
    """
    file = model_file(path)
    if not file.is_file():
        raise HostError(f"there is no model {file}")
    model = load_without_weights(file, HostError)
    graph = model.graph
    if not graph.output:
        raise HostError(f"can't read {file} as an ONNX file: its graph has no outputs")
    defaults = {tensor.name: tensor for tensor in graph.initializer}
    inputs = [given for given in graph.input if given.name not in defaults or _is_setting(model, defaults[given.name])]
    return Signature(
        path=file,
        inputs=tuple(_tensor(file, given, optional=given.name in defaults) for given in inputs),
        outputs=tuple(_tensor(file, output) for output in graph.output),
        data=tuple(sorted(data_files(file, model, HostError))),
        uses_library=any(node.domain == schema.DOMAIN for node in _nodes(model)),
    )


def _is_setting(model: ModelProto, default: TensorProto) -> bool:
    """Whether an input's default is a number that a caller may override, rather than a weight."""
    elements = 1
    for dim in default.dims:
        elements *= dim
    return model.ir_version > _INITIALIZERS_ARE_NO_DEFAULTS and elements == 1


def _tensor(file: Path, value: ValueInfoProto, *, optional: bool = False) -> Tensor:
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type" or not value.type.tensor_type.HasField("shape"):
        what = "a tensor without a shape" if kind == "tensor_type" else f"no tensor ({kind or 'no type'})"
        raise HostError(
            f"{file}: {value.name} is {what}; a server has to be told the rank of every input and output: export the "
            f"model with shapes"
        )
    tensor = value.type.tensor_type
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim)
    return Tensor(value.name, tensor.elem_type, shape, optional)


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """A graph and those within its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs:
                yield from _graphs(inner)


def _nodes(model: ModelProto) -> Iterator[NodeProto]:
    """The nodes of the graph and its subgraphs; those of functions are what stands in for the library."""
    for graph in _graphs(model.graph):
        yield from graph.node
