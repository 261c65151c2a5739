"""Compiled kernels in one file, which the native library carries: csrc/cuda_kernels.cc reads the same format.

All numbers are little-endian and unsigned. A header: magic (8 bytes), number of kernels (u32), zero (u32), size of the
file in bytes (u64). Then a record for each kernel: target, hidden pointers, threads, shared bytes, and the lengths of
name, parameters and symbol (u32 each), zero (u32), offset of the image in the file and its size in bytes (u64 each);
after it name, parameters and symbol in ASCII, zeros up to a multiple of 8. Then the images, each at a multiple of 16
and followed by a zero at least, as the driver wants text (PTX) to end.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_MAGIC = b"ACTCUDA1"
_HEADER = struct.Struct("<8sIIQ")
_RECORD = struct.Struct("<8I2Q")
_IMAGE_ALIGNMENT = 16
_MOST_THREADS = 1024
_LETTERS = frozenset("pilft")


class CatalogueError(ValueError):
    """A catalogue, or a kernel that is to go into one, is not as it has to be."""


@dataclass(frozen=True)
class KernelImage:
    """One kernel compiled for one target.

    Attributes:
        name: What the host program calls it, e.g. "forward.bf16.128"; the same for all targets.
        target: Compute capability times ten of the machine code, e.g. 80, 90; 0 for PTX, which the driver compiles.
        parameters: A letter for each launch parameter in order: p pointer, i int32, l int64, f float32, t TMA's map of
            a tensor (128 bytes by value, at a multiple of 64).
        hidden_pointers: Pointers after those, which are passed null.
        threads: Of a block.
        shared_bytes: Shared memory of a block.
        symbol: The kernel's name in the image.
        image: Machine code (a cubin) or PTX.
    """

    name: str
    target: int
    parameters: str
    hidden_pointers: int
    threads: int
    shared_bytes: int
    symbol: str
    image: bytes

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
            CatalogueError: One is not as it has to be; the error names kernel and value.
        """
        for field in ("name", "symbol"):
            value = getattr(self, field)
            if not (value and value.isascii() and value.isprintable()):
                raise CatalogueError(f"kernel {self.name!r}: {field} is {value!r}, expected printable ASCII")
        if wrong := sorted(set(self.parameters) - _LETTERS):
            raise CatalogueError(f"kernel {self.name!r}: parameters has {wrong[0]!r}, expected p, i, l, f, t")
        for field, most in (
            ("target", 999),
            ("hidden_pointers", 16),
            ("threads", _MOST_THREADS),
            ("shared_bytes", 1 << 20),
        ):
            value = getattr(self, field)
            if not 0 <= value <= most:
                raise CatalogueError(f"kernel {self.name!r}: {field} is {value}, expected 0 to {most}")
        if self.threads == 0 or self.threads % 32:
            raise CatalogueError(f"kernel {self.name!r}: threads is {self.threads}, expected whole warps of 32")
        if not self.image:
            raise CatalogueError(f"kernel {self.name!r}: the image is empty")

    @property
    def target_name(self) -> str:
        """The target in words: "sm_90", or "ptx"."""
        return f"sm_{self.target}" if self.target else "ptx"


def write_catalogue(path: Path, images: Sequence[KernelImage]) -> None:
    """Writes a catalogue.

    Raises:
        CatalogueError: There are no images, two of one name and target, or parameters that differ between targets.
        OSError: The file can't be written.
    """
    _check(images)
    records = [_strings(image) for image in images]
    offset = _HEADER.size + sum(_RECORD.size + len(strings) for strings in records)
    table, data = bytearray(), bytearray()
    for image, strings in zip(images, records, strict=True):
        data += bytes(-(offset + len(data)) % _IMAGE_ALIGNMENT)
        lengths = (len(image.name), len(image.parameters), len(image.symbol))
        table += _RECORD.pack(
            image.target,
            image.hidden_pointers,
            image.threads,
            image.shared_bytes,
            *lengths,
            0,
            offset + len(data),
            len(image.image),
        )
        table += strings
        data += image.image + b"\0"
    path.write_bytes(_HEADER.pack(_MAGIC, len(images), 0, offset + len(data)) + table + data)


def read_catalogue(path: Path) -> list[KernelImage]:
    """Reads a catalogue.

    Raises:
        CatalogueError: The file is no catalogue, is cut off, or says what can't be.
        OSError: The file can't be read.
    """
    content = path.read_bytes()
    if len(content) < _HEADER.size or not content.startswith(_MAGIC):
        raise CatalogueError(f"{path} is not a catalogue of kernels: it doesn't begin with {_MAGIC.decode()}")
    _, count, _, size = _HEADER.unpack_from(content)
    if size != len(content):
        raise CatalogueError(f"{path} has {len(content)} bytes, but its header says {size}")
    images, position = [], _HEADER.size
    try:
        for _ in range(count):
            image, position = _read_record(content, position)
            images.append(image)
        _check(images)
    except (struct.error, CatalogueError, UnicodeDecodeError) as error:
        raise CatalogueError(f"{path}: kernel {len(images)} of {count}: {error}") from error
    return images


def _strings(image: KernelImage) -> bytes:
    strings = (image.name + image.parameters + image.symbol).encode("ascii")
    return strings + bytes(-len(strings) % 8)


def _read_record(content: bytes, position: int) -> tuple[KernelImage, int]:
    *numbers, _, offset, size = _RECORD.unpack_from(content, position)
    target, hidden_pointers, threads, shared_bytes, *lengths = numbers
    start = position + _RECORD.size
    strings = []
    for length in lengths:
        strings.append(content[start : start + length].decode("ascii"))
        start += length
    if offset % _IMAGE_ALIGNMENT or offset < start or offset + size >= len(content):
        raise CatalogueError(f"{strings[0]!r}: an image of {size} bytes at {offset} is not inside the file")
    name, parameters, symbol = strings
    image = content[offset : offset + size]
    found = KernelImage(name, target, parameters, hidden_pointers, threads, shared_bytes, symbol, image)
    return found, start + -sum(lengths) % 8


def _check(images: Sequence[KernelImage]) -> None:
    if not images:
        raise CatalogueError("a catalogue has one kernel at least")
    counts = Counter((image.name, image.target_name) for image in images)
    for (name, target), count in counts.items():
        if count > 1:
            raise CatalogueError(f"kernel {name!r} is there {count} times for {target}")
    parameters: dict[str, str] = {}
    for image in images:
        known = parameters.setdefault(image.name, image.parameters)
        if known != image.parameters:
            raise CatalogueError(
                f"kernel {image.name!r} has parameters {image.parameters!r} for {image.target_name} and {known!r} for "
                "another target: the host program passes the same to all"
            )
