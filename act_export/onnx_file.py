"""Reading an ONNX file without its weights."""

from __future__ import annotations

from pathlib import Path

import onnx

from act_export.errors import ActExportError, others_errors

GENAI_CONFIG = "genai_config.json"
"""Of onnxruntime-genai, beside a model."""


def load_without_weights(file: Path, error: type[ActExportError] = ActExportError) -> onnx.ModelProto:
    """The model of a file; weights that lie in other files aren't loaded.

    Args:
        file: The ONNX file.
        error: Raised if it can't be read.
    """
    with others_errors(f"can't read {file} as an ONNX file", error=error):
        return onnx.load(file, format="protobuf", load_external_data=False)


def properties_of(model: onnx.ModelProto, file: Path, error: type[ActExportError] = ActExportError) -> dict[str, str]:
    """A model's metadata, by key.

    Args:
        model: Of the file.
        file: Named in errors.
        error: Raised if a text isn't UTF-8.
    """
    with others_errors(f"can't read the metadata of {file}", error=error):
        return {entry.key: entry.value for entry in model.metadata_props}
