"""Calibrations as ONNX Runtime's own adapters (`.onnx_adapter`), which override a graph's input for a request."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from act_export.calibration.strengths import check_strengths
from act_export.errors import SessionError
from act_export.files import write_whole
from act_export.onnx_file.names import CALIBRATION
from act_export.onnx_file.record import FileRecord
from act_export.runtime.device import import_onnxruntime
from act_export.staging import scratch_folder

FOLDER = "adapters"
SUFFIX = ".onnx_adapter"
_VERSION = 1  # of what the tensor means
_MOST_BYTES = 64 << 20


def model_version(record: FileRecord) -> int:
    """31 bits that tell a file's model from another of the same shape; 0 where nothing does.

    They are of the fingerprint of its weights, or, where a model that somebody else exported has none, of the graph
    that it was.
    """
    fingerprint = record.model.fingerprint if record.model is not None else None
    text = (fingerprint or "").rpartition(":")[2] or (record.graft.digest if record.graft is not None else "")
    try:
        return int(text[:8], 16) & 0x7FFFFFFF
    except ValueError:
        return 0


def write_adapter(path: Path, strengths: NDArray[np.float32], version: int) -> None:
    """Writes an adapter, whole or not at all.

    Args:
        path: `X.onnx_adapter`.
        strengths: (1, heads, 3), of all heads that the file can calibrate.
        version: See `model_version`.

    Raises:
        SessionError: If a link, a device or the like is there.
        OSError: If the folder can't be written to.
    """
    onnxruntime = import_onnxruntime()
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(_VERSION)
    adapter.set_model_version(version)
    adapter.set_parameters({CALIBRATION: onnxruntime.OrtValue.ortvalue_from_numpy(strengths)})
    with scratch_folder() as folder:
        adapter.export_adapter(str(folder / path.name))
        content = (folder / path.name).read_bytes()
    write_whole(path, content, error=SessionError)


def write_adapters(folder: Path, properties: Mapping[str, str]) -> None:
    """Writes `adapters/NAME.onnx_adapter` for every calibration of a file, plain among them.

    Args:
        folder: Of the file.
        properties: The file's metadata, by key.

    Raises:
        SessionError: If there is such a file already.
        OSError: If they can't be written.
    """
    record = FileRecord.read(properties, str(folder))
    calibrations = record.calibrations
    for name in adapter_names(record):
        assert calibrations is not None  # it has names
        path = folder / FOLDER / f"{name}{SUFFIX}"
        if path.exists():
            raise SessionError(f"the model has {FOLDER}/{path.name} already; rename the calibration, or that file")
        write_adapter(path, calibrations.heads.strengths(calibrations[name]), model_version(record))


def stale_adapters(folder: Path) -> list[str]:
    """Adapters of calibrations in a folder that another export goes to, which they don't fit: their paths in it."""
    found = []
    for path in sorted((folder / FOLDER).glob(f"*{SUFFIX}")):
        with suppress(Exception):  # what ONNX Runtime can't read isn't ours, and its errors have no common base
            adapter = import_onnxruntime().AdapterFormat.read_adapter(str(path.absolute()))
            if [*adapter.get_parameters()] == [CALIBRATION]:
                found.append(f"{FOLDER}/{path.name}")
    return found


def adapter_names(record: FileRecord) -> tuple[str, ...]:
    """Of the calibrations that a folder has as adapters; none where no head can be calibrated."""
    calibrations = record.calibrations
    return calibrations.names if calibrations is not None and len(calibrations.heads) else ()


def read_adapter(path: str | os.PathLike[str], heads: int, version: int, model: Path) -> NDArray[np.float32]:
    """The strengths in an adapter of a model.

    Args:
        path: The adapter.
        heads: Number of heads that the model's file can calibrate.
        version: Its `model_version`; an adapter of another is refused.
        model: The file, for errors.

    Returns:
        (1, heads, 3).

    Raises:
        SessionError: If there is no such file, it is no adapter, or of another model or of other heads.
        CalibrationError: If a value is out of range.
    """
    file = Path(path)
    if not file.is_file():
        raise SessionError(f"there is no adapter {file}")
    if file.stat().st_size > _MOST_BYTES:
        raise SessionError(f"{file} has {file.stat().st_size} bytes; a calibration's adapter has a few thousand")
    try:
        found = import_onnxruntime().AdapterFormat.read_adapter(str(file.absolute()))
        parameters = {name: value.numpy().copy() for name, value in found.get_parameters().items()}
        versions = (found.get_adapter_version(), found.get_model_version())
    except Exception as error:  # ONNX Runtime's errors have no common base
        raise SessionError(f"{file} is no adapter that ONNX Runtime can read: {_first_line(error)}") from error
    strengths: NDArray[np.float32] | None = parameters.get(CALIBRATION)
    if strengths is None or len(parameters) > 1:
        raise SessionError(
            f"{file} is no calibration's adapter: it overrides {', '.join(sorted(parameters)) or 'nothing'}, not "
            f"{CALIBRATION}"
        )
    if versions[0] != _VERSION:
        raise SessionError(f"{file} was written by another version of act-export; write it again")
    if version and versions[1] != version:
        raise SessionError(
            f"{file} is of another model (version {versions[1]}; {model} has {version}): write one with "
            f"act-export adapter {model} --calibration ... --out {file.name}"
        )
    if strengths.dtype != np.float32 or strengths.shape != (1, heads, 3):
        raise SessionError(
            f"{file} has strengths {strengths.dtype} {strengths.shape}; {model} can calibrate {heads} heads and needs "
            f"float32 (1, {heads}, 3): write it again for this file"
        )
    check_strengths(strengths)
    return strengths


def _first_line(error: Any) -> str:
    return str(error).splitlines()[0][:300] if str(error) else type(error).__name__
