"""What ONNX Runtime needs to run on a GPU, and what to do where it is missing."""

from __future__ import annotations

import contextlib
import ctypes
import io
from pathlib import Path
from typing import Any

from act_export.errors import SessionError
from act_export.ops.library import library_info
from act_export.runtime.cuda_driver import CudaDriver, CudaDriverError
from act_export.runtime.device import CUDA_PROVIDER

_INSTALL = "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'act-export[gpu]'"
_LOG_ERRORS = 3
_PROVIDER_LIBRARIES = ("libonnxruntime_providers_shared.so", "libonnxruntime_providers_cuda.so")


def prepare_cuda(onnxruntime: Any, index: int, *, native: bool) -> None:
    """Checks everything that can be told before a session is made, and loads the CUDA libraries of pip's packages.

    From here on ONNX Runtime's own logger, which is the process's, tells errors only: it warns of each session on a GPU
    that the provider wasn't registered as a plugin, which it needn't be.

    Args:
        onnxruntime: The module.
        index: Of the GPU.
        native: Whether the native library is to run the attention.

    Raises:
        SessionError: If ONNX Runtime was built without CUDA, there is no driver or GPU, the driver is too old, or the
            native library has no CUDA kernels.
    """
    if CUDA_PROVIDER not in onnxruntime.get_available_providers():
        raise SessionError(
            f"this ONNX Runtime ({onnxruntime.__version__}) was built without CUDA: {_INSTALL}; or run with "
            f"--device cpu"
        )
    try:
        driver = CudaDriver()
        driver.check_index(index)
    except CudaDriverError as error:
        raise SessionError(str(error)) from error
    needed = cuda_version(onnxruntime)
    if needed and driver.cuda[0] < int(needed.split(".")[0]):
        raise SessionError(
            f"the NVIDIA driver supports CUDA {driver.cuda[0]}.{driver.cuda[1]}, but ONNX Runtime "
            f"{onnxruntime.__version__} needs CUDA {needed}: update the driver, or run with --device cpu"
        )
    if native and not library_info().cuda:
        raise SessionError(
            "the native library of this installation has no CUDA kernels: install act-export with them, or run the "
            "portable functions: native=False, --portable on the command line"
        )
    onnxruntime.set_default_logger_severity(_LOG_ERRORS)
    _load_libraries(onnxruntime)


def check_runs_on_cuda(onnxruntime: Any, inner: Any) -> None:
    """Refuses a session that ONNX Runtime made without the GPU, of which it only writes to its log.

    Raises:
        SessionError: With the reason, where it can be found.
    """
    if CUDA_PROVIDER in inner.get_providers():
        return
    raise SessionError(
        f"ONNX Runtime {onnxruntime.__version__} can't use the GPU: {_reason(onnxruntime)}. Its CUDA libraries come "
        f"with pip install 'act-export[gpu]'; or run with --device cpu"
    )


def cuda_version(onnxruntime: Any) -> str:
    """CUDA that ONNX Runtime was built with, e.g. "13.0"; empty where it doesn't say."""
    return str(getattr(onnxruntime, "cuda_version", "") or "")


def _load_libraries(onnxruntime: Any) -> None:
    """Finds the libraries of pip's nvidia packages; says nothing, since what is missing shows when the session is made.

    It prints what it doesn't find to standard output, where a command may be writing JSON.
    """
    preload = getattr(onnxruntime, "preload_dlls", None)
    if preload is not None:
        with contextlib.redirect_stdout(io.StringIO()):
            preload()


def _reason(onnxruntime: Any) -> str:
    """Why the provider's library can't be loaded, by loading it as ONNX Runtime does."""
    folder = Path(onnxruntime.__file__).parent / "capi"
    try:
        for name in _PROVIDER_LIBRARIES:
            ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return str(error)
    return "it gave the reason on standard error"
