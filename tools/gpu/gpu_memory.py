"""Device memory through the driver alone, with ctypes and torch's tensors on the host."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor


class Gpu:
    """The primary context of the first GPU, current for this thread, and the memory that was taken from it."""

    def __init__(self) -> None:
        """Starts the driver.

        Raises:
            OSError: There is none.
            RuntimeError: There is no GPU.
        """
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._call("cuInit", 0)
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxPushCurrent_v2", context)
        self._addresses: list[int] = []

    def place(self, tensor: Tensor) -> OnGpu:
        """A copy of a tensor in device memory."""
        tensor = tensor.contiguous()
        size = tensor.numel() * tensor.element_size()
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
        self._addresses.append(address.value)
        if size:
            self._call("cuMemcpyHtoD_v2", address, ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(size))
        return OnGpu(self, address.value, tensor)

    def read(self, address: int, tensor: Tensor) -> Tensor:
        """What is at an address, as a tensor like the given one; waits for all that was launched before."""
        found = torch.empty_like(tensor)
        size = tensor.numel() * tensor.element_size()
        self._call("cuStreamSynchronize", None)
        if size:
            self._call(
                "cuMemcpyDtoH_v2", ctypes.c_void_p(found.data_ptr()), ctypes.c_uint64(address), ctypes.c_size_t(size)
            )
        return found

    def free(self) -> None:
        """All that was placed."""
        for address in self._addresses:
            self._call("cuMemFree_v2", ctypes.c_uint64(address))
        self._addresses.clear()

    def close(self) -> None:
        """Frees all; the context isn't current any more."""
        self.free()
        context = ctypes.c_void_p()
        self._call("cuCtxPopCurrent_v2", ctypes.byref(context))

    def _call(self, function: str, *arguments: object) -> None:
        result = getattr(self._driver, function)(*arguments)
        if result:
            raise RuntimeError(f"{function} failed: CUDA error {result}")


class OnGpu:
    """A tensor in device memory."""

    def __init__(self, gpu: Gpu, address: int, tensor: Tensor) -> None:
        self.address = address
        self._gpu, self._like = gpu, tensor

    def read(self) -> Tensor:
        """What is there now."""
        return self._gpu.read(self.address, self._like)
