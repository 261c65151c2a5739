"""Reading an ONNX file without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from act_export.errors import ActExportError, others_errors
from act_export.onnx_file.external_data import data_files

if TYPE_CHECKING:
    import onnx_ir as ir


def load_without_weights(file: Path, error: type[ActExportError] = ActExportError) -> onnx.ModelProto:
    """The model of a file; weights that lie in other files aren't loaded.

    Args:
        file: The ONNX file.
        error: Raised if it can't be read.
    """
    with others_errors(f"can't read {file} as an ONNX file", error=error):
        return onnx.load(file, format="protobuf", load_external_data=False)


def load_graph(file: Path, error: type[ActExportError] = ActExportError) -> ir.Model:
    """The model of a file, to be rewritten or taken apart; weights in other files are read when they are asked for.

    Args:
        file: The ONNX file.
        error: Raised if it can't be read, or has weights where they may not be, see `data_files`.
    """
    import onnx_ir as ir

    proto = load_without_weights(file, error)
    data_files(file, error)
    with others_errors(f"can't read {file} as an ONNX file", error=error):
        model = ir.serde.deserialize_model(proto)
        ir.external_data.set_base_dir(model.graph, file.parent)
    return model


def properties_of(model: onnx.ModelProto, file: Path, error: type[ActExportError] = ActExportError) -> dict[str, str]:
    """A model's metadata, by key.

    Args:
        model: Of the file.
        file: Named in errors.
        error: Raised if a text isn't UTF-8.
    """
    with others_errors(f"can't read the metadata of {file}", error=error):
        return {entry.key: entry.value for entry in model.metadata_props}
