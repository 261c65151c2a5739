"""Writes a graph and its weights, and checks what was written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from act_export.errors import ActExportError
from act_export.progress import BytesWritten

if TYPE_CHECKING:
    import onnx_ir as ir

_SPARE_BYTES = 16 << 20


_INLINE_BYTES = 256  # shapes and other small constants stay in the graph: shape inference reads them


def save_model(model: ir.Model, path: Path, progress: BytesWritten | None = None) -> None:
    """Writes graph and weights: `path`, and beside it `path` + ".data".

    Weights are read one at a time, in the order of the graph's initializers, and not kept.

    Args:
        model: Its weights may be lazy.
        path: The ONNX file.
        progress: Called before each weight is written, with the bytes that are written and all bytes.

    Raises:
        ActExportError: If the disk is too full.
    """
    import onnx_ir as ir

    weights_bytes = sum(
        value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None
    )
    check_free_space(path.parent, weights_bytes + _SPARE_BYTES)

    def report(_: ir.TensorProtocol, place: ir.external_data.CallbackInfo) -> None:
        if progress is not None:
            progress(place.offset, weights_bytes)

    ir.save(model, path, external_data=path.name + ".data", size_threshold_bytes=_INLINE_BYTES, callback=report)


def check_model(path: Path) -> None:
    """Full check with strict shape inference, as `onnx.checker` does it for a file with external data.

    Raises:
        onnx.checker.ValidationError: If the file isn't a valid model.
    """
    onnx.checker.check_model(str(path), full_check=True)


def check_free_space(folder: Path, needed_bytes: int) -> None:
    """Raises ActExportError unless the disk of a folder, there or to be made, has room."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise ActExportError(
            f"{folder} has {free_bytes / 1e6:.0f} MB free; the export needs {needed_bytes / 1e6:.0f} MB"
        )
