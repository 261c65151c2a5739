"""A model in ONNX Runtime: what it takes and gives, what can't be run, and one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from act_export.errors import SessionError, needs_extras, others_errors, shown
from act_export.onnx_file.external_data import data_files
from act_export.onnx_file.names import CALIBRATION, LOGITS, LOGITS_TO_KEEP, MASK, PAST_SINKS, POSITIONS
from act_export.onnx_file.record import PREFIX, FileRecord, Limits
from act_export.onnx_file.state import BFLOAT16, DTYPES, State, StateInput, bound_type, state_inputs
from act_export.ops.library import LibraryNotFoundError, library_path
from act_export.runtime.cuda import check_runs_on_cuda, prepare_cuda
from act_export.runtime.device import Device, Provider, import_onnxruntime
from act_export.runtime.request import Requests
from act_export.runtime.token_input import TokenInput

_OLDEST = (1, 24)  # ONNX Runtime that the native library runs in


class Engine:
    """An open file that ONNX Runtime runs. `Session` is one that people use, a `Cache` needs no more than this.

    Attributes:
        path: The ONNX file.
        native: Whether the native library runs the attention, rather than the portable functions.
        device: Where it runs; caches are there too.
        shared_threads: Whether it runs in the process's own thread pool.
        properties: The file's act-export metadata, without its prefix, as it stands.
        record: What it says, checked.
        requests: What a request can be calibrated to.
        token_input: What new tokens are given as: ids, or embeddings.
        state_inputs: The parts of the state, in the graph's order.
        logits_dtype: Type of the logits.
        keeps_logits: Whether the file can compute the logits of the last positions alone; of others, such as models
            that somebody else exported, all are computed and the last are returned.
        takes_positions: Whether the file wants `position_ids`; others count the tokens themselves.
        pads_left: Whether sequences may begin with padding. In models that somebody else exported, layers without
            calibrated heads may have an operator that can't leave it out.
        shares_buffers: Whether past and present may be the same memory, longer than what is in it.
    """

    def __init__(
        self, path: Path, inner: Any, *, native: bool, device: Device | None = None, shared_threads: bool = False
    ) -> None:
        """Wraps an `onnxruntime.InferenceSession`; see `Session.open`."""
        self.path = path
        self.native = native
        self.device = device or Device()
        self.shared_threads = shared_threads
        self._inner = inner
        with others_errors(f"can't read the metadata of {path}", error=SessionError):  # it may be no UTF-8
            metadata = dict(inner.get_modelmeta().custom_metadata_map)
        self.properties: dict[str, str] = {
            key.removeprefix(PREFIX): value for key, value in metadata.items() if key.startswith(PREFIX)
        }
        self.record = FileRecord.read(metadata, str(path), error=SessionError)
        self.requests = Requests(path, self.record)
        limits = self.record.limits
        self.token_input = TokenInput.of(inner, path, vocabulary=limits.vocabulary, placeholders=limits.placeholders)
        self.token_input.shared_threads = shared_threads
        self.state_inputs = state_inputs(inner, self._state_of_graph)
        logits = next((output for output in inner.get_outputs() if output.name == LOGITS), None)
        if not self.state_inputs or logits is None:
            raise SessionError(f"{path} has no logits or no past_key_values; is it a model that act-export wrote?")
        if logits.type not in DTYPES or len(logits.shape) != 3:
            raise SessionError(
                f"the logits of {path} are {logits.type} {shown(logits.shape)}; they must be float32, float16 or "
                f"bfloat16, (batch, sequence, vocabulary)"
            )
        self._declared_logits = logits.shape[-1]
        self.logits_dtype = DTYPES[logits.type]
        optional = {given.name: given.shape for given in inner.get_overridable_initializers()}
        self.keeps_logits = LOGITS_TO_KEEP in optional
        self.takes_positions = self.token_input.position_axes > 0
        graft, ours = self.record.graft, self.record.ours
        self.pads_left: bool = graft.pads_left if graft else ours or not self._counts_tokens()
        self.shares_buffers: bool = graft.shares_buffers if graft else ours
        self._check_sinks()
        self._check_calibration(optional.get(CALIBRATION))

    @property
    def onnxruntime_session(self) -> Any:
        """The `onnxruntime.InferenceSession`.

        Raises:
            SessionError: If the session was closed.
        """
        if self._inner is None:
            raise SessionError(f"the session over {self.path} was closed")
        return self._inner

    def close(self) -> None:
        """Ends the session; it can't run any more, and is freed when its caches are."""
        self._inner = None

    @property
    def limits(self) -> Limits:
        """Vocabulary, context length and stop tokens, as recorded in the file."""
        return self.record.limits

    @property
    def logits_size(self) -> int:
        """Logits of a position.

        Raises:
            SessionError: If neither the graph nor the record says.
        """
        declared = self._declared_logits
        known = declared if isinstance(declared, int) and declared > 0 else self.limits.vocabulary
        if known is None:
            raise SessionError(f"{self.path} doesn't say how many logits a position has; export it with shapes")
        return known

    def empty_state(self, batch: int) -> State:
        """The state before the first run."""
        return {part.name: part.zeros(batch, 0) for part in self.state_inputs}

    def run_values(self, feeds: Mapping[str, NDArray[Any]], logits_to_keep: int) -> tuple[NDArray[np.float32], State]:
        """One forward pass over arrays.

        Args:
            feeds: Tokens, mask, positions and every part of the state, and the calibration where it isn't the default;
                what the file doesn't take is left out.
            logits_to_keep: Number of last positions to return logits of; 0 for all.

        Returns:
            Logits, and the state after it.

        Raises:
            SessionError: If the session was closed, or ONNX Runtime fails.
        """
        inner = self.onnxruntime_session
        given = {name: array for name, array in feeds.items() if name != POSITIONS or self.takes_positions}
        if self.keeps_logits:
            given[LOGITS_TO_KEEP] = np.array(logits_to_keep)
        names = [part.name for part in self.state_inputs]
        if any(part.dtype == BFLOAT16 for part in self.state_inputs):
            logits, *present = self._run_by_address(given, logits_to_keep)
        else:
            with self.errors():
                logits, *present = inner.run([LOGITS, *(part.present for part in self.state_inputs)], given)
        return self.last(logits, logits_to_keep), dict(zip(names, present, strict=True))

    def _run_by_address(self, feeds: Mapping[str, NDArray[Any]], logits_to_keep: int) -> list[NDArray[Any]]:
        """As `onnxruntime.InferenceSession.run`, of arrays of types that it doesn't take or give."""
        batch, sequence = feeds[self.token_input.name].shape[:2]
        total = feeds[MASK].shape[1]
        outputs = {LOGITS: self.logits_array(batch, sequence, logits_to_keep)}
        outputs |= {part.present: np.empty(part.shape(batch, total), part.dtype) for part in self.state_inputs}
        given = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        binding = self.onnxruntime_session.io_binding()
        with self.errors():
            for name, array in given.items():
                binding.bind_input(name, "cpu", 0, bound_type(array.dtype), array.shape, array.ctypes.data)
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, bound_type(array.dtype), array.shape, array.ctypes.data)
        self.run_bound(binding)
        return [*outputs.values()]

    def run_bound(self, binding: Any) -> None:
        """One forward pass over what is bound to an `onnxruntime.IOBinding` of this session.

        Raises:
            SessionError: If the session was closed, or ONNX Runtime fails.
        """
        inner = self.onnxruntime_session
        with self.errors():
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
            logits_to_keep: As `Session.run` takes it.

        Raises:
            SessionError: If the session was closed, a sequence is too long, or `logits_to_keep` is no such number.
        """
        _ = self.onnxruntime_session
        if not isinstance(logits_to_keep, int | np.integer) or logits_to_keep < 0:
            raise SessionError(f"logits_to_keep is {logits_to_keep}; give a number of positions, or 0 for all")
        context = self.limits.context
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

    @contextmanager
    def errors(self) -> Iterator[None]:
        """What ONNX Runtime raises in the block becomes a SessionError."""
        try:
            yield
        except Exception as error:  # ONNX Runtime's errors have no common base
            raise SessionError(f"ONNX Runtime can't run {self.path}: {error}") from error

    def _state_of_graph(self, name: str) -> StateInput:
        """A part of the state whose shape doesn't say its sizes, as in models that somebody else exported."""
        with needs_extras(f"reading the sizes of the cache off the graph of {self.path}", error=SessionError):
            from act_export.onnx_file.graph_state import state_of_file
        return state_of_file(self.path, name)

    def _counts_tokens(self) -> bool:
        """Whether a model has GroupQueryAttention, which takes the first tokens of a row for real."""
        with needs_extras(f"{self.path}, which act-export didn't write,", error=SessionError):
            from act_export.onnx_file.load import load_without_weights
        graph = load_without_weights(self.path, SessionError).graph
        return any(node.op_type == "GroupQueryAttention" for node in graph.node)

    def _check_calibration(self, shape: Sequence[object] | None) -> None:
        """Refuses a record of calibrations that the graph's input, of this shape, doesn't take."""
        heads = len(self.requests.calibrations.heads) if self.requests.calibrations is not None else 0
        if not self.record.ours:
            return  # what it means isn't known, and the default holds
        if (heads or shape is not None) and (shape is None or list(shape[1:]) != [heads, 3]):
            takes = "no input calibration" if shape is None else f"an input calibration {shown(list(shape))}"
            raise SessionError(
                f"{self.path} has {takes}, and says that {heads} heads can be calibrated; the file was changed after "
                f"it was written: write it again"
            )

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
        sinks = (name for name in known if name.startswith(PAST_SINKS))
        odd = next((name for name in sinks if not name.removeprefix(PAST_SINKS).isdecimal()), None)
        if odd is not None:
            raise SessionError(f"{self.path} has an input {shown(odd)}; {PAST_SINKS} must be followed by a layer")


def load_inner(
    file: Path, options: Any, device: Device, native: bool, providers: Sequence[Provider] | None = None
) -> Any:
    """An `onnxruntime.InferenceSession`; errors as of `Session.open`."""
    onnxruntime = import_onnxruntime()
    data_files(file, SessionError)
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


def _version_of(onnxruntime: Any) -> tuple[int, int]:
    major, minor, *_ = str(onnxruntime.__version__).split(".")
    return int(major), int(minor)
