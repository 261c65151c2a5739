"""Sessions and tensors on the CPU or on a GPU, for what measures and checks the operator.

Tensors are bound to sessions by their address: so a bfloat16 one can be bound, which ONNX Runtime makes of no array,
and two names can be given the same memory.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
from onnx import helper

from act_export.errors import SessionError
from act_export.ops.library import library_info
from act_export.runtime.cuda import check_runs_on_cuda, prepare_cuda
from act_export.runtime.device import CPU_PROVIDER, CUDA_PROVIDER, Device

Array = np.ndarray[Any, np.dtype[Any]]

_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
DTYPES = tuple(_DTYPES)


def storage(dtype: str) -> np.dtype[Any]:
    """The type that arrays of a dtype have."""
    found: np.dtype[Any] = np.dtype(_DTYPES[dtype])
    return found


def make_session(
    model: bytes, library: Path, device: Device, *, cuda_graph: bool = False, shared_threads: bool = False
) -> onnxruntime.InferenceSession:
    """A session with the native library.

    Args:
        model: Serialized.
        library: The native library.
        device: Where it runs.
        cuda_graph: On a GPU, the first run is made several times and captured into a CUDA graph, which later ones
            replay. What that run adds to a state in place is added as often.
        shared_threads: Use the process's thread pool, made before.

    Raises:
        SessionError: If ONNX Runtime can't use the device, or the library has no kernels for it.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.use_per_session_threads = not shared_threads
    options.register_custom_ops_library(str(library))
    if not device.is_cuda:
        return onnxruntime.InferenceSession(model, options, providers=[CPU_PROVIDER])
    _prepare_cuda(device.index)
    if not library_info(library).cuda:
        raise SessionError(
            f"{library} has no CUDA kernels: build it with cmake -DACT_CUDA=ON, or give another with --library"
        )
    first, *_ = device.providers
    assert isinstance(first, tuple)
    provider = (CUDA_PROVIDER, {**first[1], "enable_cuda_graph": str(int(cuda_graph))})
    session = onnxruntime.InferenceSession(model, options, providers=[provider, CPU_PROVIDER])
    check_runs_on_cuda(onnxruntime, session)
    return session


@cache
def _prepare_cuda(index: int) -> None:
    prepare_cuda(onnxruntime, index, native=False)


class DeviceTensor:
    """An array's copy in the memory of a device.

    Attributes:
        shape: Of the array.
        dtype: Of the array.
    """

    def __init__(self, array: Array, device: Device) -> None:
        """Copies an array, which may be empty.

        Raises:
            SessionError: If ONNX Runtime can't use the device.
        """
        self.shape = array.shape
        self.dtype = array.dtype
        self._device = device
        # An empty array gets a byte too: then every tensor has an address.
        content = _bytes_of(array) if array.size else np.zeros(1, np.uint8)
        if device.is_cuda:
            _prepare_cuda(device.index)
        # On the CPU an OrtValue borrows the array's memory.
        content = content if device.is_cuda else content.copy()
        self._value = onnxruntime.OrtValue.ortvalue_from_numpy(content, device.kind, device.index)

    def read(self) -> Array:
        """A copy in an array."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        content: Array = self._value.numpy().copy()
        return content.view(self.dtype).reshape(self.shape)

    def write(self, array: Array) -> None:
        """Overwrites it in place with an array of the same shape and type."""
        if (array.shape, array.dtype) != (self.shape, self.dtype):
            raise ValueError(f"an array {array.shape} of {array.dtype} isn't {self.shape} of {self.dtype}")
        if array.size:
            self._value.update_inplace(_bytes_of(array))

    def bind_input(self, binding: Any, name: str) -> None:
        """Makes it the input of this name; it has to live as long as the binding."""
        binding.bind_input(name, *self._place())

    def bind_output(self, binding: Any, name: str) -> None:
        """Makes it the output of this name; as `bind_input`."""
        binding.bind_output(name, *self._place())

    def _place(self) -> tuple[Any, ...]:
        kind = int(helper.np_dtype_to_tensor_dtype(self.dtype))
        return self._device.kind, self._device.index, kind, list(self.shape), self._value.data_ptr()


def _bytes_of(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
