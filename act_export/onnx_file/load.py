"""Reading an ONNX file without its weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from act_export.errors import ActExportError, SessionError, others_errors
from act_export.files import path_inside
from act_export.json_file import look_up, read_json
from act_export.onnx_file.names import GENAI_CONFIG

if TYPE_CHECKING:
    pass


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


def model_file(path: str | os.PathLike[str]) -> Path:
    """The ONNX file of a path: itself, or of a folder the one that genai_config.json names, else `model.onnx`."""
    file = Path(path)
    if not file.is_dir():
        return file
    genai = file / GENAI_CONFIG
    name = look_up(read_json(genai, error=SessionError), "model", "decoder", "filename") if genai.is_file() else None
    return path_inside(file, "model.onnx" if name is None else name, f"the model of {file}", error=SessionError)
