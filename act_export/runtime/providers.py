"""Importing ONNX Runtime, whichever package brought it."""

from __future__ import annotations

import importlib
from importlib import metadata
from types import ModuleType

from act_export.errors import ActExportError

_PACKAGES = ("onnxruntime", "onnxruntime-gpu")


class RuntimeNotInstalledError(ActExportError):
    """There is no usable ONNX Runtime."""


def import_onnxruntime() -> ModuleType:
    """The `onnxruntime` module.

    Raises:
        RuntimeNotInstalledError: If neither package is installed, or both are: they overwrite each other's files.
    """
    installed = [name for name in _PACKAGES if _is_installed(name)]
    if len(installed) > 1:
        raise RuntimeNotInstalledError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files: "
            "pip uninstall -y onnxruntime onnxruntime-gpu, then install the one you want"
        )
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        detail = f" ({error})" if installed else ""
        raise RuntimeNotInstalledError(
            f"ONNX Runtime isn't installed{detail}: pip install 'act-export[cpu]' or 'act-export[gpu]'"
        ) from error


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
