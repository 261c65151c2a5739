"""Makes ONNX Runtime's CUDA provider small enough to carry: one architecture's kernels, and of them some families.

Those that a language model's float graph can't launch go; what was taken out fails only where it is launched.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from act_export.ops.cuda.toolkit import tool

PROVIDER = "libonnxruntime_providers_cuda.so"
_LEFT_OUT = re.compile(r"Moe|moe_|GemmUniversal|fpA_intB|DeviceRadix|aged|deep_gemm|fp4|FP4|e2m1")
_MAGIC = 0xBA55ED50
_MACHINE_CODE = 2
_ARCHITECTURE = 28  # where an image's header has it
_NO_CARD = 120  # an architecture that the machine isn't


class _Image(NamedTuple):
    offset: int
    kind: int
    header: int
    size: int
    architecture: int


def prune_provider(library: Path, architecture: int = 90) -> None:
    """Zeroes what isn't needed, in place, so that the file compresses; needs readelf.

    Raises:
        ValueError: It isn't built as expected.
    """
    data = bytearray(library.read_bytes())
    said = subprocess.run(["readelf", "-SW", library], capture_output=True, text=True, check=True).stdout
    section = re.search(r"\.nv_fatbin\s+\S+\s+\S+\s+(\S+)\s+(\S+)", said)
    if section is None:
        raise ValueError(f"{library} has no section .nv_fatbin")
    begin, size = int(section[1], 16), int(section[2], 16)
    images = list(_images(data, begin, begin + size))
    kept = [one for one in images if one.kind == _MACHINE_CODE and one.architecture == architecture]
    with tempfile.TemporaryDirectory() as folder:
        command = [tool("cuobjdump"), "-xelf", f"sm_{architecture}", library.resolve()]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        files = sorted(Path(folder).glob("*.cubin"), key=_number)
        if len(files) != len(kept):
            found = f"cuobjdump finds {len(files)}"
            raise ValueError(f"{library} has {len(kept)} images for sm_{architecture}, but {found}")
        for one, file in zip(kept, files, strict=True):
            names = re.findall(rb"\.text\.([A-Za-z0-9_$.]+)", file.read_bytes())
            if any(_LEFT_OUT.search(name.decode()) for name in names[:5]):
                struct.pack_into("<I", data, one.offset + _ARCHITECTURE, _NO_CARD)
                _zero(data, one)
    for one in set(images) - set(kept):
        _zero(data, one)
    library.write_bytes(data)


def _images(data: bytearray, position: int, end: int) -> Iterator[_Image]:
    """Every image of the fat binaries between two offsets."""
    while position < end:
        if struct.unpack_from("<I", data, position)[0] != _MAGIC:
            position += 8
            continue
        _, _, head, length = struct.unpack_from("<IHHQ", data, position)
        position += head
        stop = position + length
        while position < stop:
            kind, _, header, size = struct.unpack_from("<HHIQ", data, position)
            yield _Image(position, kind, header, size, struct.unpack_from("<I", data, position + _ARCHITECTURE)[0])
            position += header + size
        position = stop


def _zero(data: bytearray, image: _Image) -> None:
    begin = image.offset + image.header
    data[begin : begin + image.size] = bytes(image.size)


def _number(file: Path) -> int:
    found = re.search(r"\.(\d+)\.sm", file.name)
    if found is None:
        raise ValueError(f"{file} isn't named as cuobjdump names images")
    return int(found[1])
