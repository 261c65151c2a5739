"""Writing an export so that what lies at the final name is whole and verified, or isn't there."""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import onnx
import onnx_ir as ir

from act_export import __version__
from act_export.calibration import Calibration, ModelIdentity
from act_export.errors import ActExportError
from act_export.ops import functions, schema

METADATA_PREFIX = "act_export."
_SPARE_BYTES = 16 << 20
_INLINE_BYTES = 256  # shapes and other small constants stay in the graph: shape inference reads them


class OutputError(ActExportError):
    """The output can't be written where it was asked for."""


def metadata(calibration: Calibration | None, identity: ModelIdentity, source: str) -> dict[str, str]:
    """What travels inside the ONNX file: version, calibration, and the model that it was made from."""
    properties = {"version": __version__, "model": json.dumps(asdict(identity)), "source": source}
    if calibration is not None:
        properties["calibration"] = calibration.to_json()
    return {METADATA_PREFIX + key: value for key, value in properties.items()}


def finish_model(model: ir.Model, properties: Mapping[str, str]) -> None:
    """Adds the portable functions of the operators in use, and the metadata."""
    used = {node.op_type for node in model.graph if node.domain == schema.DOMAIN}
    for operator in sorted(used):
        function = ir.serde.deserialize_function(functions.function_body(operator))
        model.functions[function.identifier()] = function
    model.opset_imports[schema.DOMAIN] = schema.VERSION
    model.producer_name = "act-export"
    model.producer_version = __version__
    model.metadata_props.update(properties)


def save_model(model: ir.Model, path: Path) -> None:
    """Writes graph and weights: `path`, and beside it `path` + ".data".

    Raises:
        OutputError: If the disk is too full.
    """
    weights_bytes = sum(
        value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None
    )
    check_free_space(path.parent, weights_bytes + _SPARE_BYTES)
    ir.save(model, path, external_data=path.name + ".data", size_threshold_bytes=_INLINE_BYTES)


def check_model(path: Path) -> None:
    """Full check with strict shape inference, as `onnx.checker` does it for a file with external data.

    Raises:
        onnx.checker.ValidationError: If the file isn't a valid model.
    """
    onnx.checker.check_model(str(path), full_check=True)


def check_free_space(folder: Path, needed_bytes: int) -> None:
    """Raises OutputError unless the folder's disk has room."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise OutputError(f"{folder} has {free_bytes / 1e6:.0f} MB free; the export needs {needed_bytes / 1e6:.0f} MB")


def check_output(out: Path) -> None:
    """Refuses early what can't become an output: a file `*.onnx`, or a folder, in a folder that can be written to.

    Raises:
        OutputError: With what to do.
    """
    parent = out.parent
    if not parent.is_dir():
        raise OutputError(f"there is no folder {parent}; create it, or pass another --out")
    if is_file_output(out):
        if out.is_dir():
            raise OutputError(f"{out} is a folder; pass --out {out / 'model.onnx'}, or a name without .onnx")
    elif (out.exists() and not out.is_dir()) or (not out.exists() and out.suffix[1:].isalpha()):
        raise OutputError(f"{out} looks like a file but doesn't end in .onnx; pass a name ending in .onnx, or a folder")
    try:
        with tempfile.TemporaryFile(dir=out if out.is_dir() else parent):
            pass
    except OSError as error:
        raise OutputError(f"can't write to {parent}: {error.strerror}") from error


def is_file_output(out: Path) -> bool:
    """Whether `--out` means a file rather than a folder."""
    return out.suffix == ".onnx"


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`, for files that `publish` moves to their final names.

    Whatever ends the block, the temporary folder is gone afterwards.

    Raises:
        OutputError: If the disk ran full.
    """
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        yield folder
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OutputError(f"the disk of {out.parent} is full; nothing was written") from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, target: Path) -> list[Path]:
    """Moves every file of a staging folder into `target`.

    An older graph goes first and the new one comes last, so that a graph never lies beside weights that aren't its own.

    Returns:
        The final paths.
    """
    target.mkdir(exist_ok=True)
    files = sorted(folder.iterdir(), key=lambda path: path.suffix == ".onnx")
    for path in files:
        if path.suffix == ".onnx":
            (target / path.name).unlink(missing_ok=True)
    return [path.rename(target / path.name) for path in files]
