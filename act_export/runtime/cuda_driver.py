"""What NVIDIA's driver says of the GPUs of this machine, asked of the driver's own library."""

from __future__ import annotations

import ctypes
import os
import re
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from dataclasses import dataclass
from pathlib import Path

from act_export.errors import ActExportError

LIBRARY = "libcuda.so.1"
_NO_DEVICE = 100
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # device attributes
_NAME_BYTES = 256
_DRIVER_RECORD = Path("/proc/driver/nvidia/version")

_SIGNATURES = {
    "cuInit": [c_uint],
    "cuDriverGetVersion": [c_void_p],
    "cuDeviceGetCount": [c_void_p],
    "cuDeviceGet": [c_void_p, c_int],
    "cuDeviceGetName": [c_char_p, c_int, c_int],
    "cuDeviceTotalMem_v2": [c_void_p, c_int],
    "cuDeviceGetAttribute": [c_void_p, c_int, c_int],
    "cuDevicePrimaryCtxRetain": [c_void_p, c_int],
    "cuDevicePrimaryCtxRelease_v2": [c_int],
    "cuCtxPushCurrent_v2": [c_void_p],
    "cuCtxPopCurrent_v2": [c_void_p],
    "cuMemGetInfo_v2": [c_void_p, c_void_p],
    "cuGetErrorName": [c_int, c_void_p],
}


class CudaDriverError(ActExportError):
    """There is no usable driver or GPU; the message says what is missing."""


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: As the driver calls it.
        capability: Compute capability, e.g. "9.0".
        memory_bytes: In all.
        driver: Version of the driver, e.g. "580.65.06"; empty where the system doesn't say.
        cuda: Newest CUDA that the driver supports, e.g. "13.0".
    """

    name: str
    capability: str
    memory_bytes: int
    driver: str
    cuda: str


class CudaDriver:
    """The driver's library, initialized.

    Attributes:
        cuda: Newest CUDA that it supports: major and minor version.
        count: Number of GPUs that this process may use.
    """

    def __init__(self) -> None:
        """Loads and initializes it.

        Raises:
            CudaDriverError: If there is none, it fails, or it sees no GPU.
        """
        try:
            self._library = ctypes.CDLL(LIBRARY)
            for name, arguments in _SIGNATURES.items():
                function = getattr(self._library, name)
                function.argtypes, function.restype = arguments, c_int
        except (OSError, AttributeError) as error:  # no library, or one that lacks a function
            raise CudaDriverError(
                f"there is no NVIDIA driver that can be used: {error}; install one, or run with --device cpu"
            ) from error
        self._call("cuInit", 0)
        version = self._integer("cuDriverGetVersion")
        self.cuda = (version // 1000, version % 1000 // 10)
        self.count = self._integer("cuDeviceGetCount")
        if self.count == 0:
            raise CudaDriverError(_no_gpu())

    def describe(self, index: int) -> Gpu:
        """Name, memory and versions of a GPU.

        Raises:
            CudaDriverError: If there is none of this index, or the driver fails.
        """
        device = self._device(index)
        name = ctypes.create_string_buffer(_NAME_BYTES)
        self._call("cuDeviceGetName", name, _NAME_BYTES, device)
        memory = c_size_t()
        self._call("cuDeviceTotalMem_v2", byref(memory), device)
        major, minor = (
            self._integer("cuDeviceGetAttribute", attribute, device)
            for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR)
        )
        return Gpu(
            name=name.value.decode(errors="replace"),
            capability=f"{major}.{minor}",
            memory_bytes=memory.value,
            driver=_driver_version(),
            cuda=".".join(map(str, self.cuda)),
        )

    def free_bytes(self, index: int) -> int:
        """Memory of a GPU that no process has; makes CUDA's context on it, which takes some itself.

        Raises:
            CudaDriverError: If there is no such GPU, or the driver fails.
        """
        device = self._device(index)
        context, popped = c_void_p(), c_void_p()
        free, total = c_size_t(), c_size_t()
        self._call("cuDevicePrimaryCtxRetain", byref(context), device)
        try:
            self._call("cuCtxPushCurrent_v2", context)
            try:
                self._call("cuMemGetInfo_v2", byref(free), byref(total))
            finally:
                self._call("cuCtxPopCurrent_v2", byref(popped))
        finally:
            self._call("cuDevicePrimaryCtxRelease_v2", device)
        return free.value

    def check_index(self, index: int) -> None:
        """Refuses a GPU that isn't there.

        Raises:
            CudaDriverError: Naming those that are.
        """
        if index >= self.count:
            there_are = "there is 1 GPU, cuda:0" if self.count == 1 else f"there are {self.count} GPUs, from cuda:0 on"
            raise CudaDriverError(f"there is no GPU {index}: {there_are}; pass another device")

    def _device(self, index: int) -> int:
        self.check_index(index)
        return self._integer("cuDeviceGet", index)

    def _integer(self, name: str, *arguments: int) -> int:
        value = c_int()
        self._call(name, byref(value), *arguments)
        return value.value

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code == 0:
            return
        if name == "cuInit" and code == _NO_DEVICE:
            raise CudaDriverError(_no_gpu())
        text = c_char_p()
        self._library.cuGetErrorName(code, byref(text))
        known = text.value.decode() if text.value else "an error it has no name for"
        raise CudaDriverError(
            f"the NVIDIA driver can't be used: {name} gives {known} ({code}); nvidia-smi may say more, or run with "
            f"--device cpu"
        )


def _no_gpu() -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    because = f" with CUDA_VISIBLE_DEVICES={visible!r}" if visible is not None else ""
    return f"the NVIDIA driver sees no GPU{because}; make one visible, or run with --device cpu"


def _driver_version() -> str:
    try:
        record = _DRIVER_RECORD.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(r"\b\d+\.\d+(?:\.\d+)?\b", record)
    return found[0] if found else ""
