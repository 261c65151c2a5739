"""Weights that lie in files beside an ONNX file: every tensor that may have some, and where they may lie.

ONNX Runtime and onnx open what a tensor names by themselves, so the names are checked before either sees a file.
"""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from act_export.errors import ActExportError, others_errors, shown
from act_export.files import path_inside
from act_export.onnx_file.load import load_without_weights

_LOCATION = b"location"  # the key that names a file; who names none hasn't got these bytes
_NUMBER = re.compile("[0-9]{1,19}")
_HALF_BYTES = ("INT4", "UINT4", "FLOAT4E2M1")
_QUARTER_BYTES = ("INT2", "UINT2")


def tensors_of(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every tensor of a model: weights, dense and sparse, and constants, also in graphs in nodes, functions, training.

    ONNX has no other place for one.
    """
    graphs = [model.graph]
    for training in model.training_info:
        graphs += [training.initialization, training.algorithm]
    nodes = [node for function in model.functions for node in function.node]
    attributes = [given for function in model.functions for given in function.attribute_proto]
    while graphs or nodes or attributes:
        sparse: list[onnx.SparseTensorProto] = []
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            sparse += graph.sparse_initializer
            nodes += graph.node
        elif nodes:
            attributes += nodes.pop().attribute
        else:
            given = attributes.pop()
            yield from [given.t] if given.HasField("t") else []
            yield from given.tensors
            graphs += [given.g] if given.HasField("g") else []
            graphs += given.graphs
            sparse += [given.sparse_tensor] if given.HasField("sparse_tensor") else []
            sparse += given.sparse_tensors
        for each in sparse:
            yield each.values
            yield each.indices


def is_external(tensor: TensorProto) -> bool:
    """Whether a tensor's numbers lie in another file."""
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def data_files(
    file: Path, model: onnx.ModelProto, error: type[ActExportError] = ActExportError, *, missing: bool = False
) -> dict[str, int]:
    """The files that a model's weights lie in: in its folder, there, and long enough for every tensor.

    Args:
        file: The ONNX file. Where it is a link, they may also be links into the folder that it leads to.
        model: As it was read from the file, without these weights.
        error: What is raised.
        missing: Whether files may be missing.

    Returns:
        Their names, relative to the model's folder, and their bytes; 0 for those that are missing.

    Raises:
        ActExportError: Or `error`, naming the tensor and what is wrong with its place.
    """
    sizes: dict[str, int] = {}
    for tensor in tensors_of(model):
        if not is_external(tensor):
            continue
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        if location not in sizes:
            also = (file.resolve().parent,) if file.is_symlink() else ()
            path = path_inside(file.parent, location, f"the weights of {file}", error=error, also=also)
            if not path.is_file() and not missing:
                raise error(f"{file} needs its weights in {path}, which isn't there; put it beside the model")
            sizes[location] = path.stat().st_size if path.is_file() else 0
        begin, length = place_of(tensor, f"the weights of {file}", error)
        if begin + length > sizes[location] and not (missing and not sizes[location]):
            raise error(
                f"{file.parent / location} has {sizes[location]} bytes, and {shown(tensor.name)} ends at byte "
                f"{begin + length}; the file isn't whole"
            )
    return sizes


def check_before_opening(file: Path, error: type[ActExportError] = ActExportError) -> None:
    """As `data_files`, of a file that somebody else will open; one without such weights isn't even parsed.

    Raises:
        ActExportError: Or `error`.
    """
    try:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(_LOCATION) < 0:
                return
        model = onnx.load(file, format="protobuf", load_external_data=False)
    except Exception:  # it is empty, can't be read or is no model, which the other will say in its own words
        return
    data_files(file, model, error)


def place_of(
    tensor: TensorProto, what: str = "the weights", error: type[ActExportError] = ActExportError
) -> tuple[int, int]:
    """First byte and number of bytes of a tensor in the file that its numbers lie in.

    Args:
        tensor: One that `is_external`.
        what: Whose it is, for errors.
        error: What is raised.

    Raises:
        ActExportError: Or `error`, if they are no numbers, or not what type and shape make.
    """
    place = {entry.key: entry.value for entry in tensor.external_data}
    for key in ("offset", "length"):
        if not _NUMBER.fullmatch(place.get(key, "0")):
            raise error(f"{what}: {shown(tensor.name)} has the {key} {shown(place[key])}, which is no number of bytes")
    needed = _bytes_of(tensor)
    if needed is None:
        raise error(
            f"{what}: {shown(tensor.name)} is of type {tensor.data_type} and shape {shown(list(tensor.dims))}, which "
            f"no tensor in another file can be"
        )
    length = int(place.get("length", needed))
    if length != needed:
        raise error(f"{what}: {shown(tensor.name)} has {length} bytes; its type and shape make {needed}")
    return int(place.get("offset", 0)), needed


def _bytes_of(tensor: TensorProto) -> int | None:
    """What a tensor's type and shape make; None if one of them is none, or elements have no fixed size."""
    if any(dim < 0 for dim in tensor.dims) or tensor.data_type in (TensorProto.UNDEFINED, TensorProto.STRING):
        return None
    elements = int(math.prod(tensor.dims))
    try:
        name = TensorProto.DataType.Name(tensor.data_type)
        if name in _HALF_BYTES + _QUARTER_BYTES:
            per_byte = 2 if name in _HALF_BYTES else 4
            return -(-elements // per_byte)
        return elements * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    except (KeyError, ValueError):
        return None


def load_graph(file: Path, error: type[ActExportError] = ActExportError) -> ir.Model:
    """The model of a file, to be rewritten or taken apart; weights in other files are read when they are asked for.

    Args:
        file: The ONNX file.
        error: Raised if it can't be read, or has weights where they may not be, see `data_files`.
    """
    proto = load_without_weights(file, error)
    data_files(file, proto, error)
    with others_errors(f"can't read {file} as an ONNX file", error=error):
        model = ir.serde.deserialize_model(proto)
        ir.external_data.set_base_dir(model.graph, file.parent)
    return model
