"""An exported model that people open, run, and generate with."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from act_export.calibration.file import Calibration
from act_export.errors import SessionError
from act_export.onnx_file.names import CALIBRATION, MASK, PAST_SINKS, POSITIONS, model_file
from act_export.onnx_file.packed_state import PackedState
from act_export.onnx_file.state import State
from act_export.runtime.cache import DEFAULT_CAPACITY, Cache
from act_export.runtime.device import Device, Provider, import_onnxruntime
from act_export.runtime.device_memory import DeviceMemory
from act_export.runtime.engine import Engine, load_inner
from act_export.runtime.memory import HostMemory, Memory
from act_export.runtime.node_placement import NodePlacement, profile_run
from act_export.runtime.request import DEFAULT, Choice, Choices, DefaultType, check_choice
from act_export.runtime.token_input import checked_mask


class RunOutputs(NamedTuple):
    """Result of one run.

    Attributes:
        logits: (batch, sequence, vocabulary), or of the last positions that were asked for.
        state: For the next run.
    """

    logits: NDArray[np.float32]
    state: State


class Session(Engine):
    """An exported model, ready to run; its attributes are those of `Engine`."""

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        native: bool = True,
        threads: int | None = None,
        shared_threads: bool = False,
        device: str = "cpu",
        providers: Sequence[Provider] | None = None,
        calibration: Choice | DefaultType = DEFAULT,
    ) -> Session:
        """Loads a model.

        Args:
            path: The ONNX file, or a folder with it.
            native: Register the native library; otherwise the model's portable functions run.
            threads: Number of threads within an operator; None leaves it to ONNX Runtime.
            shared_threads: Run in the process's own thread pool, which `onnxruntime.set_global_thread_pool_sizes` must
                have made before the first session of the process, and which has the say over their number.
            device: "cpu", "cuda" or "cuda:N": where it runs, and where its caches are.
            providers: Execution providers, first choice first, instead of those of the device.
            calibration: Of requests that don't say, instead of the file's default: a name, a calibration, None for
                plain, or the path of a calibration file or an adapter.

        Raises:
            SessionError: If there is no such file, ONNX Runtime refuses it, the native library or its CUDA kernels are
                missing, or the device can't be used: the message says what is missing. A model never runs on the CPU
                because the GPU can't be used. If the calibration isn't known.
            CalibrationError: If the calibration doesn't fit the file.
            ActExportError: If there is no ONNX Runtime, or two.
        """
        file = model_file(path)
        if not file.is_file():
            raise SessionError(f"there is no model {file}")
        place = Device.parse(device)
        if isinstance(calibration, str | Calibration):
            check_choice(file, calibration)
        options = import_onnxruntime().SessionOptions()
        options.use_per_session_threads = not shared_threads
        if threads is not None:
            options.intra_op_num_threads = threads
        inner = load_inner(file, options, place, native, providers)
        session = cls(file, inner, native=native, device=place, shared_threads=shared_threads)
        requests = session.requests
        requests.default = requests.choose(calibration) if isinstance(calibration, str) else calibration
        requests.strengths(DEFAULT, 1)
        return session

    def __enter__(self) -> Self:
        """The session itself; the block's end closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the session."""
        self.close()

    @property
    def calibration(self) -> Calibration | None:
        """The calibration that holds where a request doesn't say; None for plain."""
        return self.record.calibration

    @property
    def calibrations(self) -> Mapping[str, Calibration | None]:
        """Those of the file by name, which requests may ask for; None for "plain"."""
        return self.requests.by_name

    def add_adapter(self, path: str | os.PathLike[str], name: str | None = None) -> str:
        """Lets requests ask for an adapter of this model by a name; see `Requests.add_adapter`."""
        return self.requests.add_adapter(path, name)

    @property
    def sink_state(self) -> dict[int, tuple[str, ...]]:
        """By calibrated layer, the parts of the state that hold its sinks.

        One part, `past_sink_scores.N`, holds running column sums (batch, calibrated heads, tokens, 1). Two, of a graft
        whose host knows no state but a cache, add up over both and their last axis to the columns' means. Empty where
        `packed_sinks` says where they are.
        """
        if self.packed_sinks is not None:
            return {}
        graft = self.record.graft
        names = graft.inputs if graft else ()
        names = names or tuple(part.name for part in self.state_inputs if part.name.startswith(PAST_SINKS))
        layers = graft.layers if graft else ()
        layers = layers or tuple(int(name.removeprefix(PAST_SINKS)) for name in names)
        size = len(names) // max(len(layers), 1)
        return {layer: names[size * i : size * (i + 1)] for i, layer in enumerate(layers)}

    @property
    def packed_sinks(self) -> PackedState | None:
        """Where the sinks are in a cache that holds them too; None where they have inputs of their own."""
        return self.record.packed

    def embed(self, input_ids: NDArray[np.int64]) -> NDArray[Any]:
        """Of a file that takes embeddings: those of token ids, as `TokenInput.embed` says."""
        return self.token_input.embed(input_ids)

    def allocate(self, batch: int, capacity: int = DEFAULT_CAPACITY, *, calibration: Choices = DEFAULT) -> Cache:
        """A cache for a batch of sequences, which `Cache.step` extends; the fast way to generate.

        With the native library it is written in place, and takes 2 * layers * key-value heads * head size * 4 bytes for
        each position of each sequence, half of that in a model of half precision (`Cache.nbytes` says how many in all).
        The host's memory is taken from the system as it fills; that of a GPU at once.

        Args:
            batch: Number of sequences.
            capacity: Positions to reserve room for, at the most the model's context. A step that needs more doubles it.
            calibration: Of the sequences: a name of `calibrations`, a calibration, or None for plain; or a list of
                these, one for each.

        Raises:
            SessionError: If a number isn't positive, the GPU has no room, or a calibration isn't known.
            CalibrationError: If a calibration doesn't fit the file.
        """
        if batch < 1 or capacity < 1:
            raise SessionError(f"a cache for {batch} sequences of {capacity} positions; give at least one of each")
        if self.limits.context is not None:
            capacity = min(capacity, self.limits.context)
        in_place = self.native and self.shares_buffers  # others join the cache by operators of their own
        cache = Cache(self, self._memory, batch, capacity, in_place=in_place)
        cache.calibrate(calibration)
        return cache

    @cached_property
    def _memory(self) -> Memory:
        """Where caches are kept."""
        return DeviceMemory(self.device, shared_threads=self.shared_threads) if self.device.is_cuda else HostMemory()

    def placement(self) -> NodePlacement:
        """Which execution provider runs each node, and how often tensors are copied between host and device.

        Loads the file once more, and profiles one run of two tokens; the device needs room for that.

        Raises:
            SessionError: If the session was closed, or ONNX Runtime fails.
        """
        _ = self.onnxruntime_session
        return placement_of(self.path, native=self.native, device=str(self.device), shared_threads=self.shared_threads)

    def run(
        self,
        input_ids: NDArray[Any],
        attention_mask: NDArray[np.int64],
        state: State | None = None,
        position_ids: NDArray[np.int64] | None = None,
        *,
        logits_to_keep: int = 0,
        calibration: Choices = DEFAULT,
    ) -> RunOutputs:
        """One forward pass with states by value, for those who reorder or compare them; see `allocate` to generate.

        Args:
            input_ids: (batch, sequence). Of a file that takes embeddings these, (batch, sequence, hidden size); token
                ids are looked up where that can be done, see `TokenInput.embed`.
            attention_mask: (batch, past + sequence), 1 for real tokens.
            state: The previous run's; None for a first run.
            position_ids: (batch, sequence), with M-RoPE also (3, batch, sequence); None counts the real tokens.
            logits_to_keep: Number of last positions to return logits of; 0 for all.
            calibration: Of this run's rows, as `allocate` takes it.

        Raises:
            SessionError: If shapes don't fit, the mask has other numbers than 0 and 1, a token isn't in the vocabulary,
                a sequence is longer than the model's context, a calibration isn't known, or ONNX Runtime fails.
            CalibrationError: If a calibration doesn't fit the file.
        """
        tokens = self.token_input.tokens(input_ids)
        batch, sequence = tokens.shape[:2]
        if state is None:
            state = self.empty_state(batch)
        past = next(iter(state.values())).shape[2]
        attention_mask = checked_mask(attention_mask, "attention_mask")
        if attention_mask.shape != (batch, past + sequence):
            raise SessionError(
                f"attention_mask has shape {attention_mask.shape}; {batch} sequences with {past} cached and {sequence} "
                f"new tokens need {(batch, past + sequence)}"
            )
        self.check((attention_mask != 0).sum(-1), logits_to_keep)
        self.check_padding(attention_mask)
        if position_ids is None:
            position_ids = np.maximum((attention_mask != 0).cumsum(-1) - 1, 0)[:, -sequence:]
        positions = self.token_input.positions(position_ids) if self.takes_positions else position_ids
        feeds = {self.token_input.name: tokens, MASK: attention_mask, POSITIONS: positions, **state}
        strengths = self.requests.strengths(calibration, batch)
        if strengths is not None:
            feeds[CALIBRATION] = strengths
        return RunOutputs(*self.run_values(feeds, logits_to_keep))


def placement_of(path: Path, *, native: bool, device: str, shared_threads: bool = False) -> NodePlacement:
    """As `Session.placement`, of a file that isn't open; arguments and errors as of `Session.open`."""
    place = Device.parse(device)

    def run(profiled: Any) -> None:
        session = Session(path, profiled, native=native, device=place)
        session.run(session.token_input.zeros(1, 2), np.ones((1, 2), np.int64))

    return profile_run(
        lambda options: load_inner(path, options, place, native), run, device, shared_threads=shared_threads
    )
