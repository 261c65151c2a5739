"""A batch of sequences that a session extends step by step: their cache, their mask, and the steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from act_export.errors import SessionError
from act_export.onnx_file.names import CALIBRATION, LOGITS, LOGITS_TO_KEEP, MASK, POSITIONS
from act_export.onnx_file.state import State, StateInput, bound_type
from act_export.runtime.engine import Engine
from act_export.runtime.memory import Buffer, HostMemory, Memory
from act_export.runtime.request import Choices
from act_export.runtime.token_input import checked_mask

DEFAULT_CAPACITY = 256


class Cache:
    """What a session keeps of a batch of sequences; `Session.allocate` makes it, `step` runs the model and extends it.

    Sequences of a batch have the same number of positions, padding included. A step that fails or is interrupted while
    the model runs leaves the cache in between: it refuses to go on until `reset`.

    In place, past and present of every layer are the same memory, longer than what is in it: the native library writes
    new keys, values and column sums there, sees by the attention mask how much is in it, and nothing is copied. The
    portable functions and other exporters' operators can't do that; with them every step copies the cache.

    Attributes:
        session: That it was allocated by.
        memory: That keys, values and column sums are in; token ids, mask and logits are the host's.
        in_place: Whether steps write into that memory.
        batch: Number of sequences.
        length: Positions so far.
        tokens: (batch,), how many of them are real tokens.
        next_positions: (batch,), what the next real token's position is where none is given.
    """

    def __init__(self, session: Engine, memory: Memory, batch: int, capacity: int, *, in_place: bool) -> None:
        """Reserves room and binds it; use `Session.allocate`."""
        self.session = session
        self.memory = memory
        self.in_place = in_place
        self.batch = batch
        self.length: int
        self.tokens: NDArray[np.int64]
        self.next_positions: NDArray[np.int64]
        self._capacity = capacity
        self._mask = np.zeros((batch, capacity), np.int64)
        self._inner = session.onnxruntime_session  # which the binding doesn't keep alive itself in older versions
        self._binding = self._inner.io_binding()
        self._inputs: dict[str, NDArray[Any]] = {}  # keeps alive what is bound
        self._strengths: NDArray[np.float32] | None = None  # of the calibration; None for the default
        self._buffers: dict[str, Buffer] = {}  # the same
        self.reset()

    @property
    def capacity(self) -> int:
        """Positions that there is room for; a step that needs more doubles it."""
        return self._capacity

    @property
    def nbytes(self) -> int:
        """Size of the keys, values and column sums in bytes, room that isn't used yet included."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def calibrate(self, calibration: Choices) -> None:
        """Calibrates the sequences otherwise from the next step on.

        What is cached stays: sums of columns hold the rows that were computed while a head's beta wasn't 1, over all
        rows that there are.

        Args:
            calibration: As `Session.allocate` takes it.

        Raises:
            SessionError: If a calibration isn't known, or a list hasn't one for each sequence.
            CalibrationError: If one doesn't fit the file.
        """
        strengths = self.session.requests.strengths(calibration, self.batch)
        if strengths is None and self._strengths is not None:
            assert self.session.requests.calibrations is not None  # it took some
            default = self.session.requests.calibrations.default
            strengths = self.session.requests.strengths(default, self.batch)
        self._strengths = strengths
        if strengths is not None:
            self._give(CALIBRATION, strengths)

    def step(
        self,
        input_ids: NDArray[Any],
        token_mask: NDArray[np.int64] | None = None,
        *,
        position_ids: NDArray[np.int64] | None = None,
        logits_to_keep: int = 1,
    ) -> NDArray[np.float32]:
        """One forward pass: a prompt, a chunk of one, or a token each.

        Args:
            input_ids: The new tokens, (batch, sequence), or embeddings, see `Session.run`.
            token_mask: (batch, sequence), 1 for real tokens; None if all are. Prompts of different lengths are padded
                on the left; a sequence that has ended gets padding.
            position_ids: (batch, sequence), with M-RoPE also (3, batch, sequence); None goes on after the largest so
                far, one for each real token.
            logits_to_keep: Number of last positions to return logits of; 0 for all.

        Returns:
            Logits (batch, positions, vocabulary).

        Raises:
            SessionError: If shapes don't fit, the mask has other numbers, a token isn't in the vocabulary, a sequence
                is longer than the model's context, ONNX Runtime fails, or the step before was interrupted.
        """
        self._check_whole()
        tokens = self.session.token_input.tokens(input_ids)
        shape = (self.batch, tokens.shape[1])
        token_mask = np.ones(shape, np.int64) if token_mask is None else checked_mask(token_mask, "token_mask")
        if not tokens.shape[:2] == token_mask.shape == shape:
            raise SessionError(
                f"{self.session.token_input.name} has shape {tokens.shape}, token_mask {token_mask.shape}; the cache "
                f"is for {self.batch} sequences, so both need {shape}"
            )
        real = token_mask != 0
        counts = self.tokens[:, None] + real.cumsum(-1)
        self.session.check(counts[:, -1:], logits_to_keep)
        if position_ids is None:
            position_ids = np.maximum(self.next_positions[:, None] + real.cumsum(-1) - 1, 0)
        elif np.shape(position_ids)[-2:] != shape:
            raise SessionError(f"position_ids has shape {np.shape(position_ids)}; its last two must be {shape}")
        position_ids = self.session.token_input.positions(position_ids)
        total = self.length + shape[1]
        with self._in_between():
            if total > self._capacity:
                self._grow(self._next_capacity(total))
            self._mask[:, self.length : total] = token_mask
            self.session.check_padding(self._mask[:, :total])
            logits = self._run(tokens, self._mask[:, :total], position_ids, logits_to_keep)
            self.length, self.tokens = total, counts[:, -1]
            largest = np.where(real, position_ids, -1).reshape(-1, *shape).max((0, 2))
            self.next_positions = np.maximum(self.next_positions, largest + 1)
        return logits

    def state(self) -> State:
        """A copy of the state, as `Session.run` takes it.

        Raises:
            SessionError: If the step before was interrupted.
        """
        self._check_whole()
        return {part.name: self._array(part)[:, :, : self.length].copy() for part in self.session.state_inputs}

    def reset(self) -> None:
        """Forgets the sequences, and keeps the room."""
        new, room = (self.memory.zeros, self._capacity) if self.in_place else (self.memory.allocate, 0)
        for part in self.session.state_inputs:
            buffer, size = self._buffers.get(part.name), self._size(part, room)
            # Growing may have been interrupted, between two buffers or while one was bound.
            if buffer is None or (buffer.rows, buffer.row_bytes) != size:
                buffer = new(*size)
            self._keep(part, buffer)
        self.length = 0
        self.tokens = np.zeros(self.batch, np.int64)
        self.next_positions = np.zeros(self.batch, np.int64)
        self._whole = True

    def _check_whole(self) -> None:
        if not self._whole:
            raise SessionError("the step before failed or was interrupted: reset the cache, or allocate another")

    @contextmanager
    def _in_between(self) -> Iterator[None]:
        self._whole = False
        yield
        self._whole = True

    def _next_capacity(self, needed: int) -> int:
        doubled, context = 2 * self._capacity, self.session.limits.context
        if context is not None and needed <= context:  # padding doesn't count, so more may be needed
            doubled = min(doubled, context)
        return max(needed, doubled)

    def _grow(self, capacity: int) -> None:
        """Takes more room, and copies layer by layer."""
        for part in self.session.state_inputs if self.in_place else ():
            _, row_bytes = self._size(part, capacity)
            self._keep(part, self.memory.widened(self._buffers[part.name], row_bytes))
        mask = np.zeros((self.batch, capacity), np.int64)
        mask[:, : self.length] = self._mask[:, : self.length]
        self._mask, self._capacity = mask, capacity

    def _run(
        self,
        tokens: NDArray[Any],
        attention_mask: NDArray[np.int64],
        position_ids: NDArray[np.int64],
        logits_to_keep: int,
    ) -> NDArray[np.float32]:
        session, present = self.session, self._buffers
        if not self.in_place and self.memory.is_shared:
            return self._run_by_value(tokens, attention_mask, position_ids, logits_to_keep)
        if not self.in_place:
            total = attention_mask.shape[1]
            present = {part.name: self.memory.allocate(*self._size(part, total)) for part in session.state_inputs}
            for part in session.state_inputs:
                self._bind(part, self._buffers[part.name], present[part.name])
        self._give(session.token_input.name, tokens)
        if session.takes_positions:
            self._give(POSITIONS, position_ids)
        self._bind_input(MASK, np.ascontiguousarray(attention_mask))
        if session.keeps_logits:
            self._give(LOGITS_TO_KEEP, np.array(logits_to_keep))
        logits = session.logits_array(self.batch, tokens.shape[1], logits_to_keep)
        where = ("cpu", 0, bound_type(logits.dtype), logits.shape, logits.ctypes.data)
        self._binding.bind_output(LOGITS, *where)
        session.run_bound(self._binding)
        self._buffers = present
        return session.last(logits, logits_to_keep)

    def _run_by_value(
        self,
        tokens: NDArray[Any],
        attention_mask: NDArray[np.int64],
        position_ids: NDArray[np.int64],
        logits_to_keep: int,
    ) -> NDArray[np.float32]:
        """ONNX Runtime makes the outputs, as it sees fit: files of others don't always say how large they are."""
        past = {part.name: self._array(part) for part in self.session.state_inputs}
        feeds = {self.session.token_input.name: tokens, MASK: attention_mask, POSITIONS: position_ids, **past}
        if self._strengths is not None:
            feeds[CALIBRATION] = self._strengths
        logits, present = self.session.run_values(feeds, logits_to_keep)
        self._buffers = {name: HostMemory.holding(array) for name, array in present.items()}
        return logits

    def _array(self, part: StateInput) -> NDArray[Any]:
        """What is kept of a part, its room included: (batch, heads, positions, size)."""
        buffer = self._buffers[part.name]
        tokens = buffer.row_bytes // (part.size * part.dtype.itemsize)
        return self.memory.read(buffer, part.dtype, part.shape(self.batch, tokens))

    def _give(self, name: str, values: NDArray[Any]) -> None:
        """Binds a copy, which goes to the device at once; the host's is written over where the shape is the same."""
        bound = self._inputs.get(name)
        if self.memory.is_shared and bound is not None and bound.shape == values.shape:
            bound[...] = values
        else:
            self._bind_input(name, np.array(values, order="C"))

    def _bind_input(self, name: str, values: NDArray[Any]) -> None:
        self._binding.bind_input(name, "cpu", 0, bound_type(values.dtype), values.shape, values.ctypes.data)
        self._inputs[name] = values

    def _keep(self, part: StateInput, buffer: Buffer) -> None:
        if self.in_place:
            self._bind(part, buffer, buffer)
        self._buffers[part.name] = buffer

    def _bind(self, part: StateInput, past: Buffer, present: Buffer) -> None:
        self._binding.bind_input(part.name, *self._place(part, past))
        self._binding.bind_output(part.present, *self._place(part, present))

    def _place(self, part: StateInput, buffer: Buffer) -> tuple[object, ...]:
        """A buffer as bindings take it."""
        device, token_bytes = self.memory.device, part.size * part.dtype.itemsize
        shape = part.shape(self.batch, buffer.row_bytes // token_bytes)
        return device.kind, device.index, bound_type(part.dtype), shape, buffer.address

    def _size(self, part: StateInput, tokens: int) -> tuple[int, int]:
        """Rows, one for each head of each sequence, and bytes of a row."""
        return self.batch * part.heads, tokens * part.size * part.dtype.itemsize
