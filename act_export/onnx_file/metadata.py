"""The metadata of an ONNX file, read without onnx, ONNX Runtime or the rest of the file."""

from __future__ import annotations

import mmap
from pathlib import Path

from act_export.onnx_file.wire import Content, Span, fields

_METADATA, _KEY, _VALUE = 14, 1, 2  # fields of a ModelProto and of an entry


def metadata_of(file: Path) -> dict[str, str] | None:
    """A file's metadata by key; None of what can't be read or is no model, which whoever opens it says."""
    try:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            entries = [
                _entry(content, span)
                for number, span in fields(content, [(0, len(content))])
                if number == _METADATA and isinstance(span, tuple)
            ]
    except (OSError, ValueError):  # the latter of an empty file, a malformed one, and a text that isn't UTF-8
        return None
    return dict(entries)


def _entry(content: Content, span: Span) -> tuple[str, str]:
    texts = {number: content[slice(*at)].decode() for number, at in fields(content, [span]) if isinstance(at, tuple)}
    return texts.get(_KEY, ""), texts.get(_VALUE, "")
