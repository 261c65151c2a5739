"""Reading an ONNX file without its weights."""

from __future__ import annotations

from pathlib import Path

import onnx

from act_export.errors import ActExportError


def load_without_weights(file: Path, error: type[ActExportError] = ActExportError) -> onnx.ModelProto:
    """The model of a file; weights that lie in other files aren't loaded.

    Args:
        file: The ONNX file.
        error: Raised if it can't be read.
    """
    try:
        return onnx.load(file, load_external_data=False)
    except Exception as cause:  # protobuf's and the system's errors have no common base
        raise error(f"can't read {file} as an ONNX file: {cause}") from cause
