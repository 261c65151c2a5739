"""Memory on a device that caches are kept in, through ONNX Runtime alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from act_export.errors import SessionError
from act_export.onnx_file.wire import message
from act_export.runtime.device import Device, import_onnxruntime
from act_export.runtime.memory import Buffer, Memory

_WORD = np.dtype(
    np.float32
)  # every provider pads it as it is; float16 goes through float32 on the CPU, which alters NaNs
_IR_VERSION, _OPSET = 10, 18
_FLOAT, _INT64 = 1, 7  # ONNX's numbers of types


class DeviceMemory(Memory):
    """A device's. Rows that are zeroed or widened must be whole words of 4 bytes.

    Zeroing and widening is done there, by a small model of its own whose one operator pads rows.
    """

    is_shared = False

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

    def allocate(self, rows: int, row_bytes: int) -> Buffer:
        """See `Memory`; SessionError if the device has no room."""
        words = -(-rows * row_bytes // _WORD.itemsize)
        try:
            value = self._onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                [max(words, 1)], _WORD, self.device.kind, self.device.index
            )
        except Exception as error:  # ONNX Runtime's errors have no common base
            raise SessionError(f"ONNX Runtime can't take {rows * row_bytes} bytes of {self.device}: {error}") from error
        return Buffer(value, int(value.data_ptr()), rows, row_bytes)

    def zeros(self, rows: int, row_bytes: int) -> Buffer:
        """See `Memory`; errors as of `allocate`."""
        larger = self.allocate(rows, row_bytes)
        one_word = np.zeros((rows, 1), _WORD)
        self._pad("cpu", 0, one_word.shape, one_word.ctypes.data, larger)
        return larger

    def widened(self, buffer: Buffer, row_bytes: int) -> Buffer:
        """See `Memory`; errors as of `allocate`."""
        larger = self.allocate(buffer.rows, row_bytes)
        shape = (buffer.rows, buffer.row_bytes // _WORD.itemsize)
        self._pad(self.device.kind, self.device.index, shape, buffer.address, larger)
        return larger

    def read(self, buffer: Buffer, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """See `Memory`."""
        words: NDArray[Any] = buffer.owner.numpy()
        return words.view(np.uint8)[: buffer.nbytes].copy().view(dtype).reshape(shape)

    def _pad(self, kind: str, index: int, shape: tuple[int, int], address: int, larger: Buffer) -> None:
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
    """One Pad from `rows` and `pads` to `padded`, as onnx would write it; fields as in onnx.proto."""

    def value(name: str, kind: int, *dims: str | int) -> bytes:
        shape = message(*((1, message((1 if isinstance(dim, int) else 2, dim))) for dim in dims))
        return message((1, name), (2, message((1, message((1, kind), (2, shape))))))

    graph = message(
        (1, message((1, "rows"), (1, "pads"), (2, "padded"), (4, "Pad"))),
        (2, "pad"),
        (11, value("rows", _FLOAT, "rows", "words")),
        (11, value("pads", _INT64, 4)),
        (12, value("padded", _FLOAT, "rows", "more words")),
    )
    return message((1, _IR_VERSION), (7, graph), (8, message((1, ""), (2, _OPSET))))
