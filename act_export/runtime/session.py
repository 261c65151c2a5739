"""An ONNX Runtime session over an exported model, with its cache and sink state."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from act_export.calibration.file import Calibration, ModelIdentity
from act_export.errors import SessionError, others_errors, shown
from act_export.onnx_file.external_data import check_before_opening
from act_export.onnx_file.graph_state import state_of_file
from act_export.onnx_file.load import load_without_weights, model_file
from act_export.onnx_file.names import LOGITS_TO_KEEP, PAST_SINKS, POSITIONS
from act_export.onnx_file.packed_state import PackedState
from act_export.onnx_file.record import PREFIX, FileRecord, Limits
from act_export.onnx_file.state import BFLOAT16, DTYPES, State, bound_type, state_inputs
from act_export.ops.library import LibraryNotFoundError, library_path
from act_export.runtime.cache import DEFAULT_CAPACITY, Cache, CopiedCache, InPlaceCache
from act_export.runtime.cuda import check_runs_on_cuda, prepare_cuda
from act_export.runtime.device import Device, Provider, import_onnxruntime
from act_export.runtime.node_placement import NodePlacement, profile_run
from act_export.runtime.token_input import TokenInput, checked_mask

if TYPE_CHECKING:
    from act_export.runtime.device_memory import DeviceMemory


_OLDEST = (1, 24)  # ONNX Runtime that the native library runs in


class RunOutputs(NamedTuple):
    """Result of one run.

    Attributes:
        logits: (batch, sequence, vocabulary), or of the last positions that were asked for.
        state: For the next run.
    """

    logits: NDArray[np.float32]
    state: State


class Session:
    """An exported model, ready to run.

    Attributes:
        path: The ONNX file.
        native: Whether the native library runs the attention, rather than the portable functions.
        device: Where it runs; caches are there too.
        properties: The file's act-export metadata, without its prefix, as it stands.
        record: What it says, checked.
        token_input: What new tokens are given as: ids, or embeddings.
        state_inputs: The parts of the state, in the graph's order.
        logits_dtype: Type of the logits.
        keeps_logits: Whether the file can compute the logits of the last positions alone; of others, such as models
            that somebody else exported, all are computed and the last are returned.
        takes_positions: Whether the file wants `position_ids`; others count the tokens themselves.
        pads_left: Whether sequences may begin with padding. In models that somebody else exported, layers without
            calibrated heads may have an operator that can't leave it out.
    """

    def __init__(
        self, path: Path, inner: Any, *, native: bool, device: Device | None = None, shared_threads: bool = False
    ) -> None:
        """Wraps an `onnxruntime.InferenceSession`; use `open`."""
        self.path = path
        self.native = native
        self.device = device or Device()
        self._shared_threads = shared_threads
        self._inner = inner
        self._memory: DeviceMemory | None = None
        with others_errors(f"can't read the metadata of {path}", error=SessionError):  # it may be no UTF-8
            metadata = dict(inner.get_modelmeta().custom_metadata_map)
        self.properties: dict[str, str] = {
            key.removeprefix(PREFIX): value for key, value in metadata.items() if key.startswith(PREFIX)
        }
        self.record = FileRecord.read(metadata, str(path), error=SessionError)
        limits = self.record.limits
        self.token_input = TokenInput.of(inner, path, vocabulary=limits.vocabulary, placeholders=limits.placeholders)
        self.token_input.shared_threads = shared_threads
        self.state_inputs = state_inputs(inner, partial(state_of_file, path))
        logits = next((output for output in inner.get_outputs() if output.name == "logits"), None)
        if not self.state_inputs or logits is None:
            raise SessionError(f"{path} has no logits or no past_key_values; is it a model that act-export wrote?")
        if logits.type not in DTYPES or len(logits.shape) != 3:
            raise SessionError(
                f"the logits of {path} are {logits.type} {shown(logits.shape)}; they must be float32, float16 or "
                f"bfloat16, (batch, sequence, vocabulary)"
            )
        self._declared_logits = logits.shape[-1]
        self.logits_dtype = DTYPES[logits.type]
        self.keeps_logits = any(given.name == LOGITS_TO_KEEP for given in inner.get_overridable_initializers())
        self.takes_positions = self.token_input.position_axes > 0
        graft, ours = self.record.graft, self.record.ours
        self.pads_left: bool = graft.pads_left if graft else ours or not _counts_tokens(path)
        self._shares_buffers: bool = graft.shares_buffers if graft else ours
        self._check_sinks()

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

        Raises:
            SessionError: If there is no such file, ONNX Runtime refuses it, the native library or its CUDA kernels are
                missing, or the device can't be used: the message says what is missing. A model never runs on the CPU
                because the GPU can't be used.
            RuntimeNotInstalledError: If there is no ONNX Runtime, or two.
        """
        file = model_file(path)
        if not file.is_file():
            raise SessionError(f"there is no model {file}")
        place = Device.parse(device)
        options = import_onnxruntime().SessionOptions()
        options.use_per_session_threads = not shared_threads
        if threads is not None:
            options.intra_op_num_threads = threads
        inner = load_inner(file, options, place, native, providers)
        return cls(file, inner, native=native, device=place, shared_threads=shared_threads)

    @property
    def logits_size(self) -> int:
        """Logits of a position.

        Raises:
            SessionError: If neither the graph nor the record says.
        """
        declared = self._declared_logits
        known = declared if isinstance(declared, int) and declared > 0 else self.record.limits.vocabulary
        if known is None:
            raise SessionError(f"{self.path} doesn't say how many logits a position has; export it with shapes")
        return known

    @property
    def limits(self) -> Limits:
        """Vocabulary, context length and stop tokens, as recorded in the file."""
        return self.record.limits

    def close(self) -> None:
        """Ends the session; it can't run any more, and is freed when its caches are."""
        self._inner = None

    def __enter__(self) -> Self:
        """The session itself; the block's end closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the session."""
        self.close()

    @property
    def calibration(self) -> Calibration | None:
        """The calibration baked into the file; None for a plain export."""
        return self.record.calibration

    @property
    def model_identity(self) -> ModelIdentity | None:
        """The model that the file was exported from."""
        return self.record.model

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

    @property
    def onnxruntime_session(self) -> Any:
        """The `onnxruntime.InferenceSession`.

        Raises:
            SessionError: If the session was closed.
        """
        self._check_open()
        return self._inner

    def allocate(self, batch: int, capacity: int = DEFAULT_CAPACITY) -> Cache:
        """A cache for a batch of sequences, which `Cache.step` extends; the fast way to generate.

        With the native library it is written in place, and takes 2 * layers * key-value heads * head size * 4 bytes for
        each position of each sequence, half of that in a model of half precision (`Cache.nbytes` says how many in all).
        The host's memory is taken from the system as it fills; that of a GPU at once.

        Args:
            batch: Number of sequences.
            capacity: Positions to reserve room for, at the most the model's context. A step that needs more doubles it.

        Raises:
            SessionError: If a number isn't positive, or the GPU has no room.
        """
        if batch < 1 or capacity < 1:
            raise SessionError(f"a cache for {batch} sequences of {capacity} positions; give at least one of each")
        if self.record.limits.context is not None:
            capacity = min(capacity, self.record.limits.context)
        in_place = self.native and self._shares_buffers  # others join the cache by operators of their own
        if not self.device.is_cuda:
            return (InPlaceCache if in_place else CopiedCache)(self, batch, capacity)
        from act_export.runtime.device_cache import CopiedDeviceCache, InPlaceDeviceCache

        return (InPlaceDeviceCache if in_place else CopiedDeviceCache)(self, batch, capacity, self._device_memory())

    def placement(self) -> NodePlacement:
        """Which execution provider runs each node, and how often tensors are copied between host and device.

        Loads the file once more, and profiles one run of two tokens; the device needs room for that.

        Raises:
            SessionError: If the session was closed, or ONNX Runtime fails.
        """
        self._check_open()
        return placement_of(self.path, native=self.native, device=str(self.device), shared_threads=self._shared_threads)

    def empty_state(self, batch: int) -> State:
        """The state before the first run."""
        return {part.name: part.zeros(batch, 0) for part in self.state_inputs}

    def run(
        self,
        input_ids: NDArray[Any],
        attention_mask: NDArray[np.int64],
        state: State | None = None,
        position_ids: NDArray[np.int64] | None = None,
        *,
        logits_to_keep: int = 0,
    ) -> RunOutputs:
        """One forward pass with states by value, for those who reorder or compare them; see `allocate` to generate.

        Args:
            input_ids: (batch, sequence). Of a file that takes embeddings these, (batch, sequence, hidden size); token
                ids are looked up where that can be done, see `TokenInput.embed`.
            attention_mask: (batch, past + sequence), 1 for real tokens.
            state: The previous run's; None for a first run.
            position_ids: (batch, sequence), with M-RoPE also (3, batch, sequence); None counts the real tokens.
            logits_to_keep: Number of last positions to return logits of; 0 for all.

        Raises:
            SessionError: If shapes don't fit, the mask has other numbers than 0 and 1, a token isn't in the vocabulary,
                a sequence is longer than the model's context, or ONNX Runtime fails.
        """
        inner = self.onnxruntime_session
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
        feeds = {
            self.token_input.name: tokens,
            "attention_mask": attention_mask,
            **state,
        }
        if self.takes_positions:
            if position_ids is None:
                position_ids = np.maximum((attention_mask != 0).cumsum(-1) - 1, 0)[:, -sequence:]
            feeds[POSITIONS] = self.token_input.positions(position_ids)
        if self.keeps_logits:
            feeds[LOGITS_TO_KEEP] = np.array(logits_to_keep)
        if any(part.dtype == BFLOAT16 for part in self.state_inputs):
            logits, present = self._run_by_address(feeds, (batch, sequence), past + sequence, logits_to_keep)
        else:
            outputs = ["logits", *(part.present for part in self.state_inputs)]
            with self._errors():
                logits, *present = inner.run(outputs, feeds)
        names = [part.name for part in self.state_inputs]
        return RunOutputs(self.last(logits, logits_to_keep), dict(zip(names, present, strict=True)))

    def run_bound(self, binding: Any) -> None:
        """One forward pass over what is bound to an `onnxruntime.IOBinding` of this session.

        Raises:
            SessionError: If the session was closed, or ONNX Runtime fails.
        """
        inner = self.onnxruntime_session
        with self._errors():
            inner.run_with_iobinding(binding)

    def logits_array(self, batch: int, sequence: int, logits_to_keep: int) -> NDArray[Any]:
        """Room for what the graph puts out when it is asked for the logits of the last positions (0: all)."""
        kept = min(logits_to_keep, sequence) if self.keeps_logits and logits_to_keep else sequence
        return np.empty((batch, kept, self.logits_size), self.logits_dtype)

    def last(self, logits: NDArray[np.float32], logits_to_keep: int) -> NDArray[np.float32]:
        """Logits of the last positions (0: all), of a run that kept these or, by an older file, all."""
        return logits if self.keeps_logits else logits[:, -logits_to_keep:].copy()

    def check(self, tokens: NDArray[np.int64], logits_to_keep: int) -> None:
        """Refuses what can't be run.

        Args:
            tokens: Number of real tokens of each sequence, with the new ones.
            logits_to_keep: As `run` takes it.

        Raises:
            SessionError: If the session was closed, a sequence is too long, or `logits_to_keep` is no such number.
        """
        self._check_open()
        if not isinstance(logits_to_keep, int | np.integer) or logits_to_keep < 0:
            raise SessionError(f"logits_to_keep is {logits_to_keep}; give a number of positions, or 0 for all")
        context = self.record.limits.context
        longest = int(tokens.max())
        if context is not None and longest > context:
            raise SessionError(f"a sequence has {longest} tokens; the model's context holds {context}")

    def check_padding(self, attention_mask: NDArray[np.int64]) -> None:
        """Refuses padding that the model can't leave out.

        Args:
            attention_mask: (batch, past + sequence).

        Raises:
            SessionError: If a sequence begins with padding, or has some inside, and not all layers can take that.
        """
        if not self.pads_left and (np.diff((attention_mask != 0).astype(np.int8), axis=-1) > 0).any():
            raise SessionError(
                f"a sequence has padding before its tokens, and {self.path} has layers of GroupQueryAttention, which "
                "can't leave it out: run sequences of the same length together, or one at a time"
            )

    def _run_by_address(
        self, feeds: Mapping[str, NDArray[Any]], shape: tuple[int, int], total: int, logits_to_keep: int
    ) -> tuple[NDArray[Any], list[NDArray[Any]]]:
        """As `onnxruntime.InferenceSession.run`, of arrays of types that it doesn't take or give."""
        batch, sequence = shape
        logits = self.logits_array(batch, sequence, logits_to_keep)
        present = [np.empty(part.shape(batch, total), part.dtype) for part in self.state_inputs]
        given = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        binding = self.onnxruntime_session.io_binding()
        with self._errors():
            for name, array in given.items():
                binding.bind_input(name, *_place(array))
        for name, array in zip(
            ["logits", *(part.present for part in self.state_inputs)], [logits, *present], strict=True
        ):
            binding.bind_output(name, *_place(array))
        self.run_bound(binding)
        return logits, present

    def _device_memory(self) -> DeviceMemory:
        if self._memory is None:
            from act_export.runtime.device_memory import DeviceMemory

            self._memory = DeviceMemory(self.device, shared_threads=self._shared_threads)
        return self._memory

    def _check_sinks(self) -> None:
        """Refuses a record of sinks that the graph doesn't have."""
        packed, graft = self.record.packed, self.record.graft
        known = {part.name for part in self.state_inputs}
        named = (*(packed.inputs if packed else ()), *(graft.inputs if graft else ()))
        missing = next((name for name in named if name not in known), None)
        if missing is not None:
            raise SessionError(
                f"{self.path} says that the sinks are in {shown(missing)}, which isn't an input of its graph; the file "
                f"was changed after it was written: write it again"
            )
        odd = next((name for name in known if name.startswith(PAST_SINKS) and not _has_number(name)), None)
        if odd is not None:
            raise SessionError(f"{self.path} has an input {shown(odd)}; {PAST_SINKS} must be followed by a layer")

    def _check_open(self) -> None:
        if self._inner is None:
            raise SessionError(f"the session over {self.path} was closed")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # ONNX Runtime's errors have no common base
            raise SessionError(f"ONNX Runtime can't run {self.path}: {error}") from error


def placement_of(path: Path, *, native: bool, device: str, shared_threads: bool = False) -> NodePlacement:
    """As `Session.placement`, of a file that isn't open; arguments and errors as of `Session.open`."""
    place = Device.parse(device)

    def run(profiled: Any) -> None:
        session = Session(path, profiled, native=native, device=place)
        session.run(session.token_input.zeros(1, 2), np.ones((1, 2), np.int64))

    return profile_run(
        lambda options: load_inner(path, options, place, native), run, device, shared_threads=shared_threads
    )


def load_inner(
    file: Path, options: Any, device: Device, native: bool, providers: Sequence[Provider] | None = None
) -> Any:
    """An `onnxruntime.InferenceSession`; errors as of `Session.open`."""
    onnxruntime = import_onnxruntime()
    check_before_opening(file, SessionError)
    options.log_severity_level = 3
    if native and _version_of(onnxruntime) < _OLDEST:
        raise SessionError(
            f"the native library needs ONNX Runtime {_OLDEST[0]}.{_OLDEST[1]} or newer; this is "
            f"{onnxruntime.__version__}: upgrade it, or run the portable functions: native=False, --portable on "
            "the command line"
        )
    if native:
        try:
            options.register_custom_ops_library(str(library_path()))
        except LibraryNotFoundError as error:
            raise SessionError(
                f"{error}; or run the portable functions: native=False, --portable on the command line"
            ) from error
    fallback = {}
    if device.is_cuda:
        prepare_cuda(onnxruntime, device.index, native=native)
        fallback = {"enable_fallback": 0}  # it would run on the CPU instead, and print why to standard output
    try:
        inner = onnxruntime.InferenceSession(
            str(file), options, providers=list(providers or device.providers), **fallback
        )
    except Exception as error:  # ONNX Runtime's errors have no common base
        raise SessionError(f"ONNX Runtime can't load {file}: {error}") from error
    if device.is_cuda:
        check_runs_on_cuda(onnxruntime, inner)
    return inner


def _has_number(name: str) -> bool:
    return name.removeprefix(PAST_SINKS).isdecimal()


def _counts_tokens(path: Path) -> bool:
    """Whether a model has GroupQueryAttention, which takes the first tokens of a row for real."""
    model = load_without_weights(path, SessionError)
    return any(node.op_type == "GroupQueryAttention" for node in model.graph.node)


def _place(array: NDArray[Any]) -> tuple[Any, ...]:
    """An array of the host, as bindings take it."""
    return "cpu", 0, bound_type(array.dtype), array.shape, array.ctypes.data


def _version_of(onnxruntime: Any) -> tuple[int, int]:
    major, minor, *_ = str(onnxruntime.__version__).split(".")
    return int(major), int(minor)
