"""Memory that caches are kept in: bytes at an address, of the host or of a device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from act_export.runtime.device import Device


@dataclass(frozen=True)
class Buffer:
    """(rows, row_bytes) bytes without a type: whoever binds it says which.

    Attributes:
        owner: The array, or the `onnxruntime.OrtValue`, that they are of.
        address: Of the first byte.
        rows: Number of rows.
        row_bytes: Of one row.
    """

    owner: Any
    address: int
    rows: int
    row_bytes: int

    @property
    def nbytes(self) -> int:
        """Size."""
        return self.rows * self.row_bytes


class Memory(ABC):
    """Allocates, zeroes, widens and reads back.

    Attributes:
        device: Whose it is.
        is_shared: Whether an array of the host that was bound is what a model reads, rather than a copy.
    """

    device: Device
    is_shared: bool

    @abstractmethod
    def allocate(self, rows: int, row_bytes: int) -> Buffer:
        """Memory that holds anything."""

    @abstractmethod
    def zeros(self, rows: int, row_bytes: int) -> Buffer:
        """Memory of zeros."""

    @abstractmethod
    def widened(self, buffer: Buffer, row_bytes: int) -> Buffer:
        """A copy with longer rows, zeros after what they have."""

    @abstractmethod
    def read(self, buffer: Buffer, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """A whole buffer as an array of the host; the memory itself where it is the host's."""


class HostMemory(Memory):
    """The host's. Zeros are taken from the system as they are written over."""

    device = Device()
    is_shared = True

    def allocate(self, rows: int, row_bytes: int) -> Buffer:
        """See `Memory`."""
        return _buffer_of(np.empty((rows, row_bytes), np.uint8))

    def zeros(self, rows: int, row_bytes: int) -> Buffer:
        """See `Memory`."""
        return _buffer_of(np.zeros((rows, row_bytes), np.uint8))

    def widened(self, buffer: Buffer, row_bytes: int) -> Buffer:
        """See `Memory`."""
        larger = self.zeros(buffer.rows, row_bytes)
        larger.owner[:, : buffer.row_bytes] = buffer.owner
        return larger

    @staticmethod
    def holding(array: NDArray[Any]) -> Buffer:
        """An array (batch, heads, positions, size) as it is."""
        return _buffer_of(np.ascontiguousarray(array).view(np.uint8).reshape(array.shape[0] * array.shape[1], -1))

    def read(self, buffer: Buffer, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """See `Memory`."""
        bytes_of_it: NDArray[np.uint8] = buffer.owner
        return bytes_of_it.reshape(-1).view(dtype).reshape(shape)


def _buffer_of(array: NDArray[np.uint8]) -> Buffer:
    return Buffer(array, array.ctypes.data, *array.shape)
