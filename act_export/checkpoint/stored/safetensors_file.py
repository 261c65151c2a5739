"""Tensors in .safetensors files: what the files say about them, and reading one at a time."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from act_export.errors import CheckpointError, shown
from act_export.json_file import parse_object
from act_export.plain_file import open_plain

_LENGTH = struct.Struct("<Q")
_MOST_HEADER_BYTES = 100_000_000  # by the format's definition
_MOST_SIZES = 16  # that a tensor's shape has
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BITS = {
    **{"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32},
    **{"F16": 16, "BF16": 16, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8},
    **{"F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
}
_ADVICE = "the download may have broken off: get the file again"


class Stored(Protocol):
    """A tensor in a checkpoint's file, of either format."""

    @property
    def file(self) -> Path:
        """The file."""
        ...

    @property
    def name(self) -> str:
        """What the file calls it."""
        ...

    @property
    def kind(self) -> str:
        """Its type as the format calls it."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Its type; anything but a float type of 16 bits or more raises CheckpointError."""
        ...

    def read(self) -> Tensor:
        """The tensor."""
        ...

    def sample(self, picks: Tensor) -> Tensor:
        """Some of its numbers, by their places in the flattened tensor."""
        ...


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a .safetensors file.

    Attributes:
        file: The file.
        name: What the file calls it.
        kind: The format's name of its type, e.g. "BF16".
        shape: Its sizes.
        offset: Of its first byte, from the start of the file.
        length: In bytes.
    """

    file: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    length: int

    @property
    def dtype(self) -> torch.dtype:
        """Its type.

        Raises:
            CheckpointError: If that is no float type of 16 bits or more.
        """
        if self.kind not in FLOATS:
            raise CheckpointError(
                f"{self.name} in {self.file} is stored as {self.kind}; weights must be float32, bfloat16 or float16"
            )
        return FLOATS[self.kind]

    def read(self) -> Tensor:
        """The tensor, in memory of its own: the file isn't mapped, so that none of it stays resident.

        Raises:
            CheckpointError: If the file can't be read, or has become shorter.
        """
        return self._runs([(0, math.prod(self.shape))]).view(self.shape)

    def sample(self, picks: Tensor) -> Tensor:
        """Some of its numbers, by their places in the flattened tensor.

        Raises:
            CheckpointError: As `read`.
        """
        if 8 * len(picks) > math.prod(self.shape):
            return self.read().flatten()[picks]
        return self._runs((place, 1) for place in picks.tolist())

    def _runs(self, runs: Iterable[tuple[int, int]]) -> Tensor:
        """Runs of numbers, by the place of their first and their count, joined."""
        runs = list(runs)
        numbers = torch.empty(sum(count for _, count in runs), dtype=self.dtype)
        view, size = numbers.view(torch.uint8).numpy().data, numbers.itemsize
        try:
            with open_plain(self.file) as opened:
                file = opened.raw
                for first, count in runs:
                    file.seek(self.offset + first * size, os.SEEK_SET)
                    part, view = view[: count * size], view[count * size :]
                    while part and (got := file.readinto(part)):
                        part = part[got:]
                    if part:
                        raise CheckpointError(f"{self.file} ends inside {self.name}; {_ADVICE}")
        except OSError as error:
            raise CheckpointError(f"can't read {self.file}: {error.strerror}") from error
        return numbers


def stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """What a .safetensors file holds, by its header; https://github.com/huggingface/safetensors#format.

    Raises:
        CheckpointError: If the file isn't there, isn't of that format, or its tensors aren't what its bytes hold, one
            after another.
    """
    header, start, size = _header(file)
    found = {name: _stored_tensor(file, name, entry, start) for name, entry in header.items() if name != "__metadata__"}
    end = start
    for tensor in sorted(found.values(), key=lambda each: (each.offset, each.length)):
        if tensor.offset + tensor.length > size:
            raise CheckpointError(
                f"{file} is cut short: it has {size} bytes, and {tensor.name} ends at {tensor.offset + tensor.length}; "
                f"{_ADVICE}"
            )
        if tensor.offset != end:
            what = "in the bytes of another tensor" if tensor.offset < end else "after bytes of no tensor"
            raise CheckpointError(f"{file} has a broken header: {shown(tensor.name)} begins {what}; {_ADVICE}")
        end = tensor.offset + tensor.length
    if end != size:
        raise CheckpointError(f"{file} has {size - end} bytes after its last tensor; {_ADVICE}")
    return found


def _header(file: Path) -> tuple[dict[str, Any], int, int]:
    """The header, where the tensors' bytes start, and the file's size."""
    try:
        with open_plain(file) as opened:
            size = os.fstat(opened.fileno()).st_size
            first = opened.read(_LENGTH.size)
            length = _LENGTH.unpack(first)[0] if len(first) == _LENGTH.size else 0
            if not 0 < length <= min(_MOST_HEADER_BYTES, size - _LENGTH.size):
                raise CheckpointError(f"{file} is no .safetensors file, or it is cut short ({size} bytes); {_ADVICE}")
            text = opened.read(length)
    except OSError as error:
        raise CheckpointError(f"can't read {file}: {error.strerror}") from error
    header = parse_object(
        text, f"{file} has a broken header: it", error=CheckpointError, advice=_ADVICE, largest_bytes=_MOST_HEADER_BYTES
    )
    return header, _LENGTH.size + length, size


def _stored_tensor(file: Path, name: str, entry: Any, start: int) -> StoredTensor:
    try:
        kind, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        right = len(shape) <= _MOST_SIZES
        right = right and all(type(number) is int and 0 <= number < 1 << 62 for number in (*shape, begin, end))
        right = right and (end - begin) * 8 == math.prod(shape) * _BITS[kind]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} has a broken header: {shown(name)} is {shown(entry)}; {_ADVICE}") from error
    if not right:
        raise CheckpointError(
            f"{file} has a broken header: {shown(name)}, {kind} of shape {shown(list(shape))}, takes bytes {begin} to "
            f"{end}; {_ADVICE}"
        )
    return StoredTensor(file, name, kind, shape, start + begin, end - begin)
