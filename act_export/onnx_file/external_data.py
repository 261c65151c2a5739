"""Weights that lie in files beside an ONNX file: every tensor that may have some, and where they may lie.

ONNX Runtime and onnx open what a tensor names by themselves, so the names are checked before either sees a file.
"""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from act_export.errors import ActExportError, shown
from act_export.files import path_inside
from act_export.onnx_file.wire import Content, MalformedError, Span, fields, varint

_MOST_DIMENSIONS = 64
_ADDRESS = "_ORT_MEM_ADDR_"  # in a location: ONNX Runtime takes the offset for an address
_NUMBER = re.compile("[0-9]{1,19}")
_DEEPEST = 128  # messages within each other; protobuf itself reads 100
_FIELDS: Mapping[str, Mapping[int, str]] = {  # messages of onnx.proto, and which others they hold in which fields
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse tensor"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse tensor", 23: "sparse tensor"},
    "sparse tensor": {1: "tensor", 2: "tensor"},
}
_MAY_BE_IN_PARTS = {("attribute", 5), ("attribute", 22), ("sparse tensor", 1), ("sparse tensor", 2)}
_DIMS, _DATA_TYPE, _NAME, _EXTERNAL_DATA, _DATA_LOCATION = 1, 2, 8, 13, 14  # fields of a tensor
_KEY, _VALUE = 1, 2
_EXTERNAL = 1
_BITS = {  # of an element, by ONNX's number of the type; texts have no fixed size
    **dict.fromkeys((11, 7, 13, 14), 64),  # float64, int64, uint64, complex64
    **dict.fromkeys((1, 6, 12), 32),  # float32, int32, uint32
    **dict.fromkeys((4, 5, 10, 16), 16),  # uint16, int16, float16, bfloat16
    **dict.fromkeys((2, 3, 9, 17, 18, 19, 20, 24, 27, 28), 8),  # uint8, int8, bool, kinds of float8, float6
    **dict.fromkeys((21, 22, 23), 4),  # uint4, int4, float4
    **dict.fromkeys((25, 26), 2),  # uint2, int2
    15: 128,  # complex128
}


@dataclass(frozen=True)
class ExternalTensor:
    """A tensor whose numbers lie in another file.

    Attributes:
        name: Of the tensor.
        dims: Shape.
        data_type: ONNX's number of the type.
        place: What it says of the place, by key: location, offset, length and others.
    """

    name: str
    dims: tuple[int, ...]
    data_type: int
    place: Mapping[str, str]

    @classmethod
    def read(cls, content: Content, spans: Iterable[Span]) -> Self | None:
        """The tensor of a `TensorProto`; None if its numbers don't lie in another file."""
        name, data_type, dims, place, external = "", 0, list[int](), dict[str, str](), False
        for number, value in fields(content, spans):
            if isinstance(value, int):
                if number == _DIMS:
                    dims.append(value)
                elif number == _DATA_TYPE:
                    data_type = value
                elif number == _DATA_LOCATION:  # any: a reader skips numbers that it doesn't know
                    external |= value & 0xFFFFFFFF == _EXTERNAL
            elif number == _DIMS:
                at, end = value
                while at < end:
                    dim, at = varint(content, at, end)
                    dims.append(dim)
            elif number == _NAME:
                name = _text(content, value)
            elif number == _EXTERNAL_DATA:
                entry = {key: _text(content, each) for key, each in fields(content, [value]) if isinstance(each, tuple)}
                place[entry.get(_KEY, "")] = entry.get(_VALUE, "")
        signed = tuple(dim - (1 << 64) if dim >> 63 else dim for dim in dims)
        return cls(name, signed, data_type, place) if external else None

    def begin_and_length(
        self, what: str = "the weights", error: type[ActExportError] = ActExportError
    ) -> tuple[int, int]:
        """First byte and number of bytes in the file that the numbers lie in.

        Args:
            what: Whose they are, for errors.
            error: What is raised.

        Raises:
            ActExportError: Or `error`, if they are no numbers, or not what type and shape make.
        """
        for key in ("offset", "length"):
            if not _NUMBER.fullmatch(self.place.get(key, "0")):
                raise error(
                    f"{what}: {shown(self.name)} has the {key} {shown(self.place[key])}, which is no number of bytes"
                )
        if self.data_type not in _BITS or any(dim < 0 for dim in self.dims):
            raise error(
                f"{what}: {shown(self.name)} is of type {self.data_type} and shape {shown(list(self.dims))}, which "
                f"no tensor in another file can be"
            )
        if len(self.dims) > _MOST_DIMENSIONS:
            raise error(f"{what}: {shown(self.name)} has {len(self.dims)} dimensions; {_MOST_DIMENSIONS} is the most")
        needed = -(-math.prod(self.dims) * _BITS[self.data_type] // 8)
        length = int(self.place.get("length", needed))
        if length != needed:
            raise error(f"{what}: {shown(self.name)} has {length} bytes; its type and shape make {needed}")
        return int(self.place.get("offset", 0)), needed


def external_tensors(file: Path) -> Iterator[ExternalTensor]:
    """Every tensor of an ONNX file that names another: weights, dense and sparse, and constants.

    They may be in graphs, also those in nodes, in functions and in training; ONNX has no other place for one. What
    can't be read or is no model ends early, which whoever opens the file says in its own words.
    """
    try:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for spans in _tensors(content, "model", [(0, len(content))]):
                if (tensor := ExternalTensor.read(content, spans)) is not None:
                    yield tensor
    except (OSError, ValueError):  # the latter of an empty file, and of a malformed one
        return


def _tensors(content: Content, kind: str, spans: list[Span], depth: int = 0) -> Iterator[list[Span]]:
    """Where the tensors in a message lie."""
    if kind == "tensor":
        yield spans
        return
    if depth > _DEEPEST:
        raise MalformedError("messages too deep within each other")
    parts: dict[int, list[Span]] = {}
    for number, value in fields(content, spans):
        inner = _FIELDS[kind].get(number)
        if inner is None or isinstance(value, int):
            continue
        if (kind, number) in _MAY_BE_IN_PARTS:
            parts.setdefault(number, []).append(value)
        else:
            yield from _tensors(content, inner, [value], depth + 1)
    for number, together in parts.items():
        yield from _tensors(content, _FIELDS[kind][number], together, depth + 1)


def data_files(file: Path, error: type[ActExportError] = ActExportError, *, missing: bool = False) -> dict[str, int]:
    """The files that a model's weights lie in: in its folder, there, and long enough for every tensor.

    Args:
        file: The ONNX file. Where it is a link, they may also be links into the folder that it leads to.
        error: What is raised.
        missing: Whether files may be missing.

    Returns:
        Their names, relative to the model's folder, and their bytes; 0 for those that are missing.

    Raises:
        ActExportError: Or `error`, naming the tensor and what is wrong with its place.
    """
    sizes: dict[str, int] = {}
    for tensor in external_tensors(file):
        location = tensor.place.get("location", "")
        if location not in sizes:
            if _ADDRESS in location:
                raise error(f"{file}: {shown(tensor.name)} has an address of memory for a place; write it again")
            also = (file.resolve().parent,) if file.is_symlink() else ()
            path = path_inside(file.parent, location, f"the weights of {file}", error=error, also=also)
            if not path.is_file() and not missing:
                raise error(f"{file} needs its weights in {path}, which isn't there; put it beside the model")
            sizes[location] = path.stat().st_size if path.is_file() else 0
        begin, length = tensor.begin_and_length(f"the weights of {file}", error)
        if begin + length > sizes[location] and not (missing and not sizes[location]):
            raise error(
                f"{file.parent / location} has {sizes[location]} bytes, and {shown(tensor.name)} ends at byte "
                f"{begin + length}; the file isn't whole"
            )
    return sizes


def _text(content: Content, span: Span) -> str:
    """A text; bytes that aren't UTF-8 stay what they are when it is the name of a file."""
    return content[slice(*span)].decode(errors="surrogateescape")
