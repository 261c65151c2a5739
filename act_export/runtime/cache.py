"""A batch of sequences that a session extends step by step: their cache, their mask, and the steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from act_export.errors import SessionError
from act_export.onnx_file.state import State, StateInput, bound_type
from act_export.runtime.token_input import checked_mask

if TYPE_CHECKING:
    from act_export.runtime.session import Session

DEFAULT_CAPACITY = 256


class Cache(ABC):
    """What a session keeps of a batch of sequences; `Session.allocate` makes it, `step` runs the model and extends it.

    Sequences of a batch have the same number of positions, padding included. A step that fails or is interrupted while
    the model runs leaves the cache in between: it refuses to go on until `reset`.

    Attributes:
        session: That it was allocated by.
        batch: Number of sequences.
        length: Positions so far.
        tokens: (batch,), how many of them are real tokens.
        next_positions: (batch,), what the next real token's position is where none is given.
    """

    def __init__(self, session: Session, batch: int, capacity: int) -> None:
        """Reserves room; use `Session.allocate`."""
        self.session = session
        self.batch = batch
        self.length = 0
        self.tokens = np.zeros(batch, np.int64)
        self.next_positions = np.zeros(batch, np.int64)
        self._capacity = capacity
        self._mask = np.zeros((batch, capacity), np.int64)
        self._whole = True

    @property
    def capacity(self) -> int:
        """Positions that there is room for; a step that needs more doubles it."""
        return self._capacity

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Size of the keys, values and column sums in bytes, room that isn't used yet included."""

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
        return self._copied_state()

    def reset(self) -> None:
        """Forgets the sequences, and keeps the room."""
        self._forget()
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
        mask = np.zeros((self.batch, capacity), np.int64)
        mask[:, : self.length] = self._mask[:, : self.length]
        self._mask, self._capacity = mask, capacity

    @abstractmethod
    def _copied_state(self) -> State: ...

    @abstractmethod
    def _forget(self) -> None: ...

    @abstractmethod
    def _run(
        self,
        tokens: NDArray[Any],
        attention_mask: NDArray[np.int64],
        position_ids: NDArray[np.int64],
        logits_to_keep: int,
    ) -> NDArray[np.float32]: ...


class BoundCache(Cache):
    """Runs the model over bound memory; what keys, values and column sums are bound to is the subclasses' affair."""

    def __init__(self, session: Session, batch: int, capacity: int) -> None:
        """Binds nothing yet."""
        super().__init__(session, batch, capacity)
        inner = session.onnxruntime_session
        self._binding = inner.io_binding()
        self._inner = inner  # which the binding doesn't keep alive itself in older versions
        self._inputs: dict[str, NDArray[Any]] = {}  # keeps alive what is bound

    def _run(
        self,
        tokens: NDArray[Any],
        attention_mask: NDArray[np.int64],
        position_ids: NDArray[np.int64],
        logits_to_keep: int,
    ) -> NDArray[np.float32]:
        session = self.session
        self._give(session.token_input.name, tokens)
        if session.takes_positions:
            self._give("position_ids", position_ids)
        self._bind_input("attention_mask", np.ascontiguousarray(attention_mask))
        if session.keeps_logits:
            self._give("logits_to_keep", np.array(logits_to_keep))
        logits = session.logits_array(self.batch, tokens.shape[1], logits_to_keep)
        where = ("cpu", 0, bound_type(logits.dtype), logits.shape, logits.ctypes.data)
        self._binding.bind_output("logits", *where)
        session.run_bound(self._binding)
        return session.last(logits, logits_to_keep)

    def _give(self, name: str, values: NDArray[Any]) -> None:
        """Binds a copy, which goes to the device at once."""
        self._bind_input(name, np.array(values, order="C"))

    def _bind_input(self, name: str, values: NDArray[Any]) -> None:
        self._binding.bind_input(name, "cpu", 0, bound_type(values.dtype), values.shape, values.ctypes.data)
        self._inputs[name] = values


class InPlaceCache(BoundCache):
    """Buffers that the native library writes new keys, values and column sums into: nothing is copied in a step.

    Past and present of every layer are bound to the same memory, longer than what is in it; the operator sees by the
    attention mask how much is. Memory is taken from the system as it is filled. Growing copies layer by layer.
    """

    def __init__(self, session: Session, batch: int, capacity: int) -> None:
        """Reserves and binds the buffers; use `Session.allocate`."""
        super().__init__(session, batch, capacity)
        self._buffers: State = {}  # keeps alive what is bound
        for part in session.state_inputs:
            self._bind_buffer(part, part.zeros(batch, capacity))

    @property
    def nbytes(self) -> int:
        """See `Cache`."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def _copied_state(self) -> State:
        return {name: buffer[:, :, : self.length].copy() for name, buffer in self._buffers.items()}

    def _forget(self) -> None:
        for part in self.session.state_inputs:
            buffer = self._buffers[part.name]
            # Growing may have been interrupted, between two buffers or while one was bound.
            fits = buffer.shape[2] == self._capacity
            self._bind_buffer(part, buffer if fits else part.zeros(self.batch, self._capacity))

    def _grow(self, capacity: int) -> None:
        for part in self.session.state_inputs:
            larger = part.zeros(self.batch, capacity)
            larger[:, :, : self.length] = self._buffers[part.name][:, :, : self.length]
            self._bind_buffer(part, larger)
        super()._grow(capacity)

    def _bind_buffer(self, part: StateInput, buffer: NDArray[Any]) -> None:
        where = ("cpu", 0, bound_type(part.dtype), buffer.shape, buffer.ctypes.data)
        self._binding.bind_input(part.name, *where)
        self._binding.bind_output(part.present, *where)
        self._buffers[part.name] = buffer

    def _give(self, name: str, values: NDArray[Any]) -> None:
        """Binds a copy; where the shape is that of the step before, writes into what is bound."""
        bound = self._inputs.get(name)
        if bound is not None and bound.shape == values.shape:
            bound[...] = values
        else:
            super()._give(name, values)


class CopiedCache(Cache):
    """States by value, for the portable functions, which can't write in place: every step copies the cache."""

    def __init__(self, session: Session, batch: int, capacity: int) -> None:
        """Begins with an empty state; use `Session.allocate`."""
        super().__init__(session, batch, capacity)
        self._state = session.empty_state(batch)

    @property
    def nbytes(self) -> int:
        """See `Cache`."""
        return sum(array.nbytes for array in self._state.values())

    def _copied_state(self) -> State:
        return {name: array.copy() for name, array in self._state.items()}

    def _forget(self) -> None:
        self._state = self.session.empty_state(self.batch)

    def _run(
        self,
        tokens: NDArray[Any],
        attention_mask: NDArray[np.int64],
        position_ids: NDArray[np.int64],
        logits_to_keep: int,
    ) -> NDArray[np.float32]:
        logits, self._state = self.session.run(
            tokens, attention_mask, self._state, position_ids, logits_to_keep=logits_to_keep
        )
        return logits
