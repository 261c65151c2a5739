"""GGUF files in several shards: all of them found by the name of one, checked, and read as one file.

`NAME-00002-of-00003.gguf` is the second of three. The first has the keys; each has tensors of its own:
https://github.com/ggml-org/llama.cpp/tree/master/tools/gguf-split
"""

from __future__ import annotations

import re
import shutil
import struct
from pathlib import Path
from typing import Any

from act_export.checkpoint.gguf.header import MAGIC, GgufFile, StoredTensor, read_header
from act_export.errors import CheckpointError, shown

_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)", re.IGNORECASE)
_MOST_SHARDS = 99_999
_OWN_KEYS = ("split.no", "split.count", "split.tensors.count")


def read_gguf(path: Path) -> tuple[GgufFile, list[Path]]:
    """What a GGUF file holds, with all of its shards where it is one of several.

    Args:
        path: The file, or any of its shards.

    Returns:
        The header, with every shard's tensors and the first shard's keys, and the files in their order.

    Raises:
        CheckpointError: If a file is damaged, or a shard is missing or doesn't belong to the others.
    """
    given = read_header(path)
    count = given.keys.get("split.count", 1)
    if type(count) is not int or count > _MOST_SHARDS:
        raise CheckpointError(f"can't load {path}: split.count is {shown(count)}; get the file again")
    named = _NAME.fullmatch(path.name)
    if count <= 1:
        if named is not None and int(named["count"]) > 1:
            raise CheckpointError(
                f"{path} is called a shard of {int(named['count'])} but has no split.count; rename it if it is whole"
            )
        return given, [path]
    paths = _paths(path, given, count)
    headers = [given if each == path else read_header(each) for each in paths]
    return _together(headers), paths


def _paths(path: Path, given: GgufFile, count: int) -> list[Path]:
    named = _NAME.fullmatch(path.name)
    number = given.keys.get("split.no")
    if named is None or int(named["count"]) != count or int(named["number"]) - 1 != number:
        raise CheckpointError(
            f"{path} is shard {shown(number)} (from 0) of {count}, and the others are found by its name; call it "
            f"NAME-{(number if isinstance(number, int) else 0) + 1:05d}-of-{count:05d}.gguf, and them likewise"
        )
    names = [f"{named['stem']}-{each + 1:05d}-of-{count:05d}{named['suffix']}" for each in range(count)]
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{path} is one of {count} shards, and {len(missing)} of them aren't beside it: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}; get them too"
        )
    return [path.parent / name for name in names]


def _together(headers: list[GgufFile]) -> GgufFile:
    first = headers[0]
    tensors: dict[str, StoredTensor] = {}
    for number, header in enumerate(headers):
        wrong = f"{header.path} doesn't belong to {first.path}"
        for key in _OWN_KEYS:
            expected: Any = number if key == "split.no" else first.keys.get(key)
            if header.keys.get(key) != expected:
                raise CheckpointError(f"{wrong}: {key} is {shown(header.keys.get(key))}, not {shown(expected)}")
        for key, value in header.keys.items():
            if key not in _OWN_KEYS and not (value == first.keys.get(key) and type(value) is type(first.keys.get(key))):
                raise CheckpointError(f"{wrong}: it has another {shown(key)}")
        twice = tensors.keys() & header.tensors.keys()
        if twice:
            raise CheckpointError(f"{wrong}: both have the tensor {shown(min(twice))}")
        tensors |= header.tensors
    told = first.keys.get("split.tensors.count")
    if told is not None and told != len(tensors):
        raise CheckpointError(
            f"the shards of {first.path} have {len(tensors)} tensors, not {shown(told)}; get them again"
        )
    size = sum(header.size_bytes for header in headers)
    return GgufFile(first.path, size, first.version, first.keys, tensors, first.spans, first.alignment)


def write_joined(gguf: GgufFile, path: Path) -> Path:
    """Writes shards as one file, holding no tensor in memory.

    Args:
        gguf: As `read_gguf` gives it.
        path: The file to write.

    Raises:
        OSError: If it can't be written.
    """
    keys = [key for key in gguf.keys if key not in _OWN_KEYS]
    with gguf.path.open("rb") as source, path.open("wb") as joined:
        joined.write(MAGIC + struct.pack("<IQQ", gguf.version, len(gguf.tensors), len(keys)))
        for key in keys:
            start, end = gguf.spans[key]
            source.seek(start)
            joined.write(source.read(end - start))
        offset = 0
        for tensor in gguf.tensors.values():
            name, shape = tensor.name.encode(), tensor.shape[::-1]
            joined.write(struct.pack("<Q", len(name)) + name + struct.pack(f"<I{len(shape)}Q", len(shape), *shape))
            joined.write(struct.pack("<IQ", int(tensor.kind), offset))
            offset += _padded(tensor.size_bytes, gguf.alignment)
        for tensor in gguf.tensors.values():
            joined.write(bytes(_padded(joined.tell(), gguf.alignment) - joined.tell()))
            with tensor.path.open("rb") as shard:
                shard.seek(tensor.start)
                _copy(shard, joined, tensor.size_bytes)
        joined.write(bytes(_padded(joined.tell(), gguf.alignment) - joined.tell()))
    return path


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _copy(source: Any, target: Any, size: int) -> None:
    while size:
        block = source.read(min(size, shutil.COPY_BUFSIZE))  # type: ignore[attr-defined]
        if not block:
            raise OSError(0, "a shard became shorter while it was read")
        target.write(block)
        size -= len(block)
