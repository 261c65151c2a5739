"""Where a session runs: the CPU, or one of the GPUs."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from act_export.errors import ActExportError, SessionError

CPU, CUDA = "cpu", "cuda"
CPU_PROVIDER, CUDA_PROVIDER = "CPUExecutionProvider", "CUDAExecutionProvider"

Provider = str | tuple[str, dict[str, Any]]
"""An execution provider as ONNX Runtime takes it: its name, or with options."""

_CUDA_OPTIONS = {
    "arena_extend_strategy": "kSameAsRequested",  # the default doubles what it takes from the GPU
    "use_tf32": "0",  # float32 is float32, as in PyTorch
}


@dataclass(frozen=True)
class Device:
    """A device that ONNX Runtime knows.

    Attributes:
        kind: "cpu" or "cuda".
        index: Of the GPU, as CUDA counts those that are visible; 0 for the CPU.
    """

    kind: str = CPU
    index: int = 0

    @classmethod
    def parse(cls, text: str) -> Device:
        """Reads "cpu", "cuda" (the first GPU) or "cuda:N".

        Raises:
            SessionError: For anything else.
        """
        found = re.fullmatch(r"cpu|cuda(?::(\d+))?", text)
        if found is None:
            raise SessionError(f"device is {text!r}; pass cpu, cuda or cuda:N, N counting GPUs from 0")
        return cls(text.partition(":")[0], int(found[1] or 0))

    @property
    def is_cuda(self) -> bool:
        """Whether it is a GPU."""
        return self.kind == CUDA

    @property
    def providers(self) -> tuple[Provider, ...]:
        """Execution providers, first choice first."""
        if not self.is_cuda:
            return (CPU_PROVIDER,)
        return ((CUDA_PROVIDER, {"device_id": str(self.index), **_CUDA_OPTIONS}), CPU_PROVIDER)

    def __str__(self) -> str:
        """As `parse` reads it."""
        return f"{self.kind}:{self.index}" if self.is_cuda else self.kind


_PACKAGES = ("onnxruntime", "onnxruntime-gpu")


def import_onnxruntime() -> ModuleType:
    """The `onnxruntime` module.

    Raises:
        ActExportError: If neither package is installed, or both are in one folder: they overwrite each other's files.
    """
    installed = [path for name in _PACKAGES if (path := _installed_in(name)) is not None]
    if len(installed) > len(set(installed)):
        raise ActExportError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files: "
            "pip uninstall -y onnxruntime onnxruntime-gpu, then install the one you want"
        )
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        detail = f" ({error})" if installed else ""
        raise ActExportError(
            f"ONNX Runtime isn't installed{detail}: pip install 'act-export[cpu]' or 'act-export[gpu]'"
        ) from error


def _installed_in(package: str) -> Path | None:
    """The folder that a package's modules were put in; None where it isn't installed."""
    from importlib import metadata  # it brings a mail reader along

    try:
        return Path(str(metadata.distribution(package).locate_file(""))).resolve()
    except metadata.PackageNotFoundError:
        return None
