"""The fields of a message in protobuf's wire format: where they lie, none copied. A file of gigabytes takes no time.

(https://protobuf.dev/programming-guides/encoding)
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator

Content = bytes | mmap.mmap
Span = tuple[int, int]
"""First byte, and the one after the last."""

_VARINT, _EIGHT_BYTES, _BYTES, _GROUP, _END_OF_GROUP, _FOUR_BYTES = range(6)
_FIXED = {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}
_MOST_BITS = 64


class MalformedError(ValueError):
    """It is no such message."""


def fields(content: Content, spans: Iterable[Span]) -> Iterator[tuple[int, int | Span]]:
    """Number and value of the fields of a message, in their order.

    Numbers of fixed size, and fields in groups, are left out: ONNX has neither where weights are named.

    Args:
        content: What it lies in.
        spans: Where. A message that is written in several parts is what they say together.

    Yields:
        Of numbers the value, without a sign; of texts, bytes, messages and packed numbers where they lie.

    Raises:
        MalformedError: If it is no message.
    """
    for at, end in spans:
        groups = 0
        while at < end:
            tag, at = varint(content, at, end)
            number, kind = (tag & 0xFFFFFFFF) >> 3, tag & 7
            value: int | Span | None = None
            if kind == _VARINT:
                value, at = varint(content, at, end)
            elif kind == _BYTES:
                size, at = varint(content, at, end)
                value = (at, at := at + size)
            elif kind in _FIXED:
                at += _FIXED[kind]
            elif kind in (_GROUP, _END_OF_GROUP):
                groups += 1 if kind == _GROUP else -1
            else:
                raise MalformedError(f"a field of kind {kind}")
            if at > end or groups < 0 or not number:
                raise MalformedError("a field that doesn't end, or has no number")
            if value is not None and not groups:
                yield number, value


def varint(content: Content, at: int, end: int) -> tuple[int, int]:
    """The number that begins at a byte, and the byte after it; `MalformedError` if it isn't whole."""
    value = shift = 0
    while at < end and shift < _MOST_BITS:
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value % (1 << _MOST_BITS), at
        shift += 7
    raise MalformedError("a number that doesn't end")


def message(*given: tuple[int, int | str | bytes]) -> bytes:
    """A message of fields: numbers, texts, and messages as bytes."""
    whole = bytearray()
    for number, value in given:
        if isinstance(value, int):
            whole += _as_varint(number << 3 | _VARINT) + _as_varint(value)
        else:
            content = value.encode() if isinstance(value, str) else value
            whole += _as_varint(number << 3 | _BYTES) + _as_varint(len(content)) + content
    return bytes(whole)


def _as_varint(value: int) -> bytes:
    parts = bytearray()
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*parts, value))
