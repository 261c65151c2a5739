"""Caches on a GPU: as those of the host, over memory of the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from act_export.onnx_file.state import State, StateInput, bound_type
from act_export.runtime.cache import BoundCache
from act_export.runtime.device_memory import DeviceBuffer, DeviceMemory

if TYPE_CHECKING:
    from act_export.runtime.session import Session


class DeviceCache(BoundCache):
    """Keys, values and column sums on a device; token ids, mask and logits are the host's.

    Attributes:
        memory: Of the device.
    """

    def __init__(self, session: Session, batch: int, capacity: int, memory: DeviceMemory) -> None:
        """Binds nothing yet; use `Session.allocate`."""
        super().__init__(session, batch, capacity)
        self.memory = memory
        self._buffers: dict[str, DeviceBuffer] = {}

    @property
    def nbytes(self) -> int:
        """See `Cache`."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def _read(self, part: StateInput, tokens: int) -> NDArray[np.generic]:
        return self.memory.read(self._buffers[part.name], part.dtype, part.shape(self.batch, tokens))

    def _size(self, part: StateInput, tokens: int) -> tuple[int, int]:
        """Rows, one for each head of each sequence, and bytes of a row."""
        return self.batch * part.heads, tokens * part.size * part.dtype.itemsize

    def _bind_past(self, part: StateInput, buffer: DeviceBuffer, tokens: int) -> None:
        self._binding.bind_input(part.name, *self._place(part, buffer, tokens))

    def _bind_present(self, part: StateInput, buffer: DeviceBuffer, tokens: int) -> None:
        self._binding.bind_output(part.present, *self._place(part, buffer, tokens))

    def _place(self, part: StateInput, buffer: DeviceBuffer, tokens: int) -> tuple[object, ...]:
        device = self.memory.device
        shape = part.shape(self.batch, tokens)
        return device.kind, device.index, bound_type(part.dtype), shape, buffer.address


class InPlaceDeviceCache(DeviceCache):
    """Buffers that the native library's CUDA kernels write into, as `InPlaceCache`: nothing is copied in a step.

    Growing takes new memory and copies on the device, layer by layer.
    """

    def __init__(self, session: Session, batch: int, capacity: int, memory: DeviceMemory) -> None:
        """Reserves and binds the buffers; use `Session.allocate`."""
        super().__init__(session, batch, capacity, memory)
        for part in session.state_inputs:
            self._bind_buffer(part, memory.zeros(*self._size(part, capacity)), capacity)

    def _copied_state(self) -> State:
        parts = self.session.state_inputs
        return {part.name: self._read(part, self._capacity)[:, :, : self.length].copy() for part in parts}

    def _forget(self) -> None:
        for part in self.session.state_inputs:
            buffer, size = self._buffers[part.name], self._size(part, self._capacity)
            # Growing may have been interrupted, between two buffers or while one was bound.
            fits = (buffer.rows, buffer.row_bytes) == size
            self._bind_buffer(part, buffer if fits else self.memory.zeros(*size), self._capacity)

    def _grow(self, capacity: int) -> None:
        for part in self.session.state_inputs:
            _, row_bytes = self._size(part, capacity)
            self._bind_buffer(part, self.memory.widened(self._buffers[part.name], row_bytes), capacity)
        super()._grow(capacity)

    def _bind_buffer(self, part: StateInput, buffer: DeviceBuffer, capacity: int) -> None:
        self._bind_past(part, buffer, capacity)
        self._bind_present(part, buffer, capacity)
        self._buffers[part.name] = buffer


class CopiedDeviceCache(DeviceCache):
    """For the portable functions, which can't write in place: every step copies the cache, on the device."""

    def __init__(self, session: Session, batch: int, capacity: int, memory: DeviceMemory) -> None:
        """Begins with an empty state; use `Session.allocate`."""
        super().__init__(session, batch, capacity, memory)
        self._forget()

    def _copied_state(self) -> State:
        return {part.name: self._read(part, self.length) for part in self.session.state_inputs}

    def _forget(self) -> None:
        self._buffers = self._allocated(0)

    def _allocated(self, tokens: int) -> dict[str, DeviceBuffer]:
        return {part.name: self.memory.allocate(*self._size(part, tokens)) for part in self.session.state_inputs}

    def _run(
        self,
        tokens: NDArray[Any],
        attention_mask: NDArray[np.int64],
        position_ids: NDArray[np.int64],
        logits_to_keep: int,
    ) -> NDArray[np.float32]:
        total = attention_mask.shape[1]
        present = self._allocated(total)
        for part in self.session.state_inputs:
            self._bind_past(part, self._buffers[part.name], self.length)
            self._bind_present(part, present[part.name], total)
        logits = super()._run(tokens, attention_mask, position_ids, logits_to_keep)
        self._buffers = present
        return logits
