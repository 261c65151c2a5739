"""Tensors in a checkpoint's files: what the files say about them, and reading one at a time."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from act_export.errors import CheckpointError

_LENGTH = struct.Struct("<Q")
_MOST_HEADER_BYTES = 100_000_000  # by the format's definition
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BITS = {
    **{"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32},
    **{"F16": 16, "BF16": 16, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8},
    **{"F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
}
_ADVICE = "the download may have broken off: get the file again"


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
        if self.kind not in _FLOATS:
            raise CheckpointError(
                f"{self.name} in {self.file} is stored as {self.kind}; weights must be float32, bfloat16 or float16"
            )
        return _FLOATS[self.kind]

    def read(self) -> Tensor:
        """The tensor, in memory of its own: the file isn't mapped, so that none of it stays resident.

        Raises:
            CheckpointError: If the file can't be read, or has become shorter.
        """
        return self._numbers(0, math.prod(self.shape)).view(self.shape)

    def sample(self, picks: Tensor) -> Tensor:
        """Some of its numbers, by their places in the flattened tensor.

        Raises:
            CheckpointError: As `read`.
        """
        if 8 * len(picks) > math.prod(self.shape):
            return self.read().flatten()[picks]
        return torch.cat([self._numbers(place, 1) for place in picks.tolist()])

    def _numbers(self, first: int, count: int) -> Tensor:
        numbers = torch.empty(count, dtype=self.dtype)
        if not count:
            return numbers
        view = numbers.view(torch.uint8).numpy().data
        try:
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.offset + first * numbers.itemsize)
                while view and (got := file.readinto(view)):
                    view = view[got:]
        except OSError as error:
            raise CheckpointError(f"can't read {self.file}: {error.strerror}") from error
        if view:
            raise CheckpointError(f"{self.file} ends inside {self.name}; {_ADVICE}")
        return numbers


def stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """What a .safetensors file holds, by its header; https://github.com/huggingface/safetensors#format.

    Raises:
        CheckpointError: If the file isn't there, isn't of that format, or is shorter than its header says.
    """
    header, start, size = _header(file)
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            tensor = _stored_tensor(file, name, entry, start)
            if tensor.offset + tensor.length > size:
                raise CheckpointError(
                    f"{file} is cut short: it has {size} bytes, and {name} ends at {tensor.offset + tensor.length}; "
                    f"{_ADVICE}"
                )
            found[name] = tensor
    return found


def _header(file: Path) -> tuple[dict[str, Any], int, int]:
    """The header, where the tensors' bytes start, and the file's size."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            first = opened.read(_LENGTH.size)
            length = _LENGTH.unpack(first)[0] if len(first) == _LENGTH.size else 0
            if not 0 < length <= min(_MOST_HEADER_BYTES, size - _LENGTH.size):
                raise CheckpointError(f"{file} is no .safetensors file, or it is cut short ({size} bytes); {_ADVICE}")
            text = opened.read(length)
    except OSError as error:
        raise CheckpointError(f"can't read {file}: {error.strerror}") from error
    try:
        header = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{file} has a broken header: {error}; {_ADVICE}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} has a broken header: it is no JSON object; {_ADVICE}")
    return header, _LENGTH.size + length, size


def _stored_tensor(file: Path, name: str, entry: Any, start: int) -> StoredTensor:
    try:
        kind, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        right = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
        right = right and (end - begin) * 8 == math.prod(shape) * _BITS[kind]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} has a broken header: {name} is {entry}; {_ADVICE}") from error
    if not right:
        raise CheckpointError(
            f"{file} has a broken header: {name}, {kind} of shape {list(shape)}, takes bytes {begin} to {end}; "
            f"{_ADVICE}"
        )
    return StoredTensor(file, name, kind, shape, start + begin, end - begin)
