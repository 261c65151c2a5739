"""Memory on a device that caches are kept in, through ONNX Runtime alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from act_export.errors import SessionError
from act_export.runtime.device import Device, import_onnxruntime

_WORD = np.dtype(
    np.float32
)  # every provider pads it as it is; float16 goes through float32 on the CPU, which alters NaNs
_IR_VERSION, _OPSET = 10, 18


@dataclass(frozen=True)
class DeviceBuffer:
    """(rows, row_bytes) bytes on a device, without a type: whoever binds it says which.

    Attributes:
        value: The `onnxruntime.OrtValue` that owns them.
        rows: Number of rows.
        row_bytes: Of one row.
    """

    value: Any
    rows: int
    row_bytes: int

    @property
    def address(self) -> int:
        """Of the first byte, on the device."""
        return int(self.value.data_ptr())

    @property
    def nbytes(self) -> int:
        """Size."""
        return self.rows * self.row_bytes


class DeviceMemory:
    """Allocates on a device, zeroes, widens and reads back.

    Zeroing and widening is done there, by a small model of its own whose one operator pads rows.
    """

    def __init__(self, device: Device, *, shared_threads: bool = False) -> None:
        """Opens the model.

        Args:
            device: Whose memory.
            shared_threads: As of `Session.open`.

        Raises:
            SessionError: If ONNX Runtime can't use the device.
        """
        self.device = device
        self._onnxruntime = import_onnxruntime()
        options = self._onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.use_per_session_threads = not shared_threads
        try:
            self._padding = self._onnxruntime.InferenceSession(
                _padding_model(), options, providers=list(device.providers)
            )
        except Exception as error:  # ONNX Runtime's errors have no common base
            raise SessionError(f"ONNX Runtime can't use {device}: {error}") from error

    def allocate(self, rows: int, row_bytes: int) -> DeviceBuffer:
        """Memory that holds anything.

        Args:
            rows: Number of rows.
            row_bytes: Of one row.

        Raises:
            SessionError: If the device has no room.
        """
        words = -(-rows * row_bytes // _WORD.itemsize)
        try:
            value = self._onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                [max(words, 1)], _WORD, self.device.kind, self.device.index
            )
        except Exception as error:  # ONNX Runtime's errors have no common base
            raise SessionError(f"ONNX Runtime can't take {rows * row_bytes} bytes of {self.device}: {error}") from error
        return DeviceBuffer(value, rows, row_bytes)

    def zeros(self, rows: int, row_bytes: int) -> DeviceBuffer:
        """Memory of zeros; arguments and errors as of `allocate`, and rows must be whole words of 4 bytes."""
        larger = self.allocate(rows, row_bytes)
        one_word = np.zeros((rows, 1), _WORD)
        self._pad("cpu", 0, one_word.shape, one_word.ctypes.data, larger)
        return larger

    def widened(self, buffer: DeviceBuffer, row_bytes: int) -> DeviceBuffer:
        """A copy with longer rows, zeros after what they have; arguments and errors as of `zeros`."""
        larger = self.allocate(buffer.rows, row_bytes)
        shape = (buffer.rows, buffer.row_bytes // _WORD.itemsize)
        self._pad(self.device.kind, self.device.index, shape, buffer.address, larger)
        return larger

    def read(self, buffer: DeviceBuffer, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """A copy of a whole buffer in an array of the host."""
        words: NDArray[Any] = buffer.value.numpy()
        return words.view(np.uint8)[: buffer.nbytes].copy().view(dtype).reshape(shape)

    def _pad(self, kind: str, index: int, shape: tuple[int, int], address: int, larger: DeviceBuffer) -> None:
        words, rest = divmod(larger.row_bytes, _WORD.itemsize)
        if rest:
            raise SessionError(
                f"a cache with rows of {larger.row_bytes} bytes can't be kept on {self.device}: they must be whole "
                f"words of {_WORD.itemsize} bytes; run the portable functions: native=False, --portable on the "
                "command line"
            )
        pads = np.array([0, 0, 0, words - shape[1]], np.int64)
        binding = self._padding.io_binding()
        binding.bind_input("rows", kind, index, _WORD, shape, address)
        binding.bind_input("pads", "cpu", 0, pads.dtype, pads.shape, pads.ctypes.data)
        place = (self.device.kind, self.device.index, _WORD, (larger.rows, words), larger.address)
        binding.bind_output("padded", *place)
        try:
            self._padding.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's errors have no common base
            raise SessionError(f"ONNX Runtime can't fill {larger.nbytes} bytes of {self.device}: {error}") from error


def _padding_model() -> bytes:
    rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["rows", "words"])
    pads = helper.make_tensor_value_info("pads", TensorProto.INT64, [4])
    padded = helper.make_tensor_value_info("padded", TensorProto.FLOAT, ["rows", "more words"])
    graph = helper.make_graph([helper.make_node("Pad", ["rows", "pads"], ["padded"])], "pad", [rows, pads], [padded])
    model = helper.make_model(graph, ir_version=_IR_VERSION, opset_imports=[helper.make_opsetid("", _OPSET)])
    serialized: bytes = model.SerializeToString()
    return serialized
