"""What a GGUF file holds: its keys and where its tensors lie, read with limits and checked against the file's size.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Nothing is taken from a file that asks for more
than it has: every count is compared with the bytes that are left before anything is made of it.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from act_export.errors import CheckpointError, shown
from act_export.plain_file import open_plain

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_VALUES = 1 << 24  # of an array; the largest vocabularies have 2^18 tokens
MOST_DIMENSIONS = 4
_LARGEST_ALIGNMENT = 1 << 20
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LONGEST_NAME = 1 << 16  # bytes
_AT_ONCE = 1 << 22  # numbers that are dequantised
_KINDS: dict[int, str] = {kind: np.dtype(f"<{code}").str for kind, code in _NUMBERS.items()}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies.

    Attributes:
        name: As the file has it.
        shape: The last dimension changes fastest, as in numpy and torch.
        kind: Its quantisation, a `gguf.GGMLQuantizationType`.
        path: The file that it is in.
        start: Its first byte there.
        size_bytes: That it takes.
    """

    name: str
    shape: tuple[int, ...]
    kind: Any
    path: Path
    start: int
    size_bytes: int

    def values(self) -> np.ndarray:
        """The numbers that the stored blocks stand for: float32, of shape `shape`.

        Raises:
            CheckpointError: If they can't be read, or this package gguf can't dequantise their kind.
        """
        from gguf import quants

        try:
            blocks = np.fromfile(self.path, np.uint8, self.size_bytes, offset=self.start)
        except OSError as cause:
            raise CheckpointError(f"can't read {self.path}: {cause.strerror or cause}") from cause
        if blocks.size != self.size_bytes:
            raise CheckpointError(f"{self.path} is cut short while it is read; tensor {shown(self.name)} isn't whole")
        rows = blocks.reshape(prod(self.shape[:-1]), -1)
        values = np.empty((len(rows), self.shape[-1]), np.float32)
        step = max(1, _AT_ONCE // self.shape[-1])
        for first in range(0, len(rows), step):  # all at once, gguf takes as much memory again
            values[first : first + step] = quants.dequantize(rows[first : first + step], self.kind)
        return values.reshape(self.shape)


@dataclass(frozen=True)
class GgufFile:
    """The header of one file.

    Attributes:
        path: The file.
        size_bytes: That it has.
        version: Of the format.
        keys: Values by key, in the file's order.
        tensors: By name, in the file's order.
        spans: First byte, and the one after the last, of each key with its value.
        alignment: Of tensors, in bytes.
    """

    path: Path
    size_bytes: int
    version: int
    keys: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    alignment: int = 32


def has_magic(path: Path) -> bool:
    """Whether a file starts as GGUF files do."""
    try:
        with open_plain(path) as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_header(path: Path) -> GgufFile:
    """The header of a GGUF file, checked: names once each, kinds known, every tensor within the file.

    Raises:
        CheckpointError: If the file can't be read, is damaged or cut short, with what is wrong where.
    """
    try:
        with open_plain(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size < 24:
                raise CheckpointError(f"{path} is cut short: it has {size} bytes, fewer than any GGUF file; {_AGAIN}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Reader(path, content, size).read()
    except OSError as cause:
        raise CheckpointError(f"can't read {path}: {cause.strerror or cause}") from cause


_AGAIN = "get the file again"


class _Reader:
    def __init__(self, path: Path, content: mmap.mmap, size: int) -> None:
        self.path, self.content, self.size, self.at = path, content, size, 0

    def wrong(self, reason: str) -> CheckpointError:
        return CheckpointError(f"can't load {self.path}: {reason}; {_AGAIN}")

    def short(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is cut short, or its header is damaged: it has {self.size} bytes, and {what} at byte "
            f"{self.at} needs more; {_AGAIN}"
        )

    def numbers(self, code: str, what: str) -> tuple[Any, ...]:
        width = struct.calcsize(f"<{code}")
        if self.at + width > self.size:
            raise self.short(what)
        found = struct.unpack_from(f"<{code}", self.content, self.at)
        self.at += width
        return found

    def text(self, what: str, longest: int | None = None) -> str:
        (length,) = self.numbers("Q", what)
        if length > self.size - self.at:
            raise self.short(f"{what} of {length} bytes")
        if longest is not None and length > longest:
            raise self.wrong(f"{what} at byte {self.at} has {length} bytes; at most {longest} are read")
        raw = self.content[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as cause:
            raise self.wrong(f"{what} at byte {self.at - length} isn't UTF-8: {shown(raw)}") from cause

    def read(self) -> GgufFile:
        magic = self.content[:4]
        if magic != MAGIC:
            raise CheckpointError(f"can't load {self.path}: it starts with {shown(magic)} and isn't a GGUF file")
        self.at = 4
        version, tensors, keys = self.numbers("IQQ", "the header")
        if version not in VERSIONS:
            if version and version & 0xFFFF == 0:
                raise CheckpointError(
                    f"can't load {self.path}: its numbers are big-endian, which isn't read; convert it with gguf's "
                    f"gguf_convert_endian.py"
                )
            raise CheckpointError(f"can't load {self.path}: it is GGUF version {version}; versions 2 and 3 are read")
        self.count(keys, 13, "keys")
        found = GgufFile(self.path, self.size, version)
        for _ in range(keys):
            start = self.at
            key = self.text("a key", _LONGEST_NAME)
            if key in found.keys:
                raise self.wrong(f"it has the key {shown(key)} twice")
            found.keys[key] = self.value(key)
            found.spans[key] = (start, self.at)
        alignment = found.keys.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= _LARGEST_ALIGNMENT or alignment & (alignment - 1):
            raise self.wrong(f"general.alignment is {shown(alignment)}, no power of two up to {_LARGEST_ALIGNMENT}")
        object.__setattr__(found, "alignment", alignment)
        self.count(tensors, 32, "tensors")
        places = [self.tensor() for _ in range(tensors)]
        self.place(found, places)
        return found

    def count(self, number: int, least_bytes: int, what: str) -> None:
        if number * least_bytes > self.size - self.at:
            raise self.short(f"a header of {number} {what}")

    def value(self, key: str) -> Any:
        (kind,) = self.numbers("I", f"the type of {shown(key)}")
        if kind == _STRING:
            return self.text(f"the value of {shown(key)}")
        if kind in _NUMBERS:
            return self.numbers(_NUMBERS[kind], f"the value of {shown(key)}")[0]
        if kind != _ARRAY:
            raise self.wrong(f"the key {shown(key)} has the type {kind}, which GGUF doesn't have")
        kind, number = self.numbers("IQ", f"the array {shown(key)}")
        if kind not in _NUMBERS and kind != _STRING:
            raise self.wrong(f"the key {shown(key)} is an array of type {kind}; arrays of numbers and strings are read")
        width = 8 if kind == _STRING else struct.calcsize(f"<{_NUMBERS[kind]}")
        if number * width > self.size - self.at:
            raise self.short(f"the array {shown(key)} of {number} values")
        if number > MOST_VALUES:
            raise self.wrong(f"the array {shown(key)} has {number} values; at most {MOST_VALUES} are read")
        if kind == _STRING:
            what = f"a string of {shown(key)}"
            return [self.text(what) for _ in range(number)]
        raw = self.content[self.at : self.at + number * width]
        self.at += number * width
        return np.frombuffer(raw, _KINDS[kind]).tolist()

    def tensor(self) -> tuple[str, tuple[int, ...], Any, int, int]:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self.text("the name of a tensor", _LONGEST_NAME)
        (dimensions,) = self.numbers("I", f"tensor {shown(name)}")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise self.wrong(f"tensor {shown(name)} has {dimensions} dimensions; 1 to {MOST_DIMENSIONS} are read")
        shape = self.numbers(f"{dimensions}Q", f"tensor {shown(name)}")[::-1]
        number, offset = self.numbers("IQ", f"tensor {shown(name)}")
        try:
            kind = GGMLQuantizationType(number)
            elements, width = GGML_QUANT_SIZES[kind]
        except (KeyError, ValueError) as cause:
            raise self.wrong(f"tensor {shown(name)} is of type {number}, which isn't known") from cause
        if 0 in shape or shape[-1] % elements:
            raise self.wrong(f"tensor {shown(name)} has shape {shape}; {kind.name} comes in blocks of {elements}")
        return name, shape, kind, offset, prod(shape) // elements * width

    def place(self, found: GgufFile, places: list[tuple[str, tuple[int, ...], Any, int, int]]) -> None:
        first = -(-self.at // found.alignment) * found.alignment
        for name, shape, kind, offset, size in places:
            if name in found.tensors:
                raise self.wrong(f"it has the tensor {shown(name)} twice")
            if offset % found.alignment:
                raise self.wrong(f"tensor {shown(name)} starts at {offset}, which isn't aligned to {found.alignment}")
            found.tensors[name] = StoredTensor(name, shape, kind, self.path, first + offset, size)
        needed = max((each.start + each.size_bytes for each in found.tensors.values()), default=0)
        if needed > self.size:
            late = [each.name for each in found.tensors.values() if each.start + each.size_bytes > self.size]
            raise CheckpointError(
                f"{self.path} is cut short: it has {self.size} bytes, and its {len(found.tensors)} tensors need "
                f"{needed}; {len(late)} of them aren't whole, e.g. {shown(late[0])}; {_AGAIN}"
            )
        ordered = sorted(found.tensors.values(), key=lambda each: each.start)
        for before, after in pairwise(ordered):
            if before.start + before.size_bytes > after.start:
                raise self.wrong(f"the tensors {shown(before.name)} and {shown(after.name)} overlap")
