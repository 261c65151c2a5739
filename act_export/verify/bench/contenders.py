"""What a benchmark runs: a file of act-export, another exporter's file, or PyTorch; each greedily, on its own cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from act_export.errors import ActExportError, SessionError
from act_export.onnx_file.language_model import ModelFile, read_model_file
from act_export.onnx_file.state import StateInput, bound_type
from act_export.runtime.cache import Cache
from act_export.runtime.device import Device, import_onnxruntime
from act_export.runtime.device_memory import DeviceMemory
from act_export.runtime.engine import load_inner
from act_export.runtime.node_placement import NodePlacement, profile_run
from act_export.runtime.request import DEFAULT
from act_export.runtime.session import Session, placement_of

if TYPE_CHECKING:
    from act_export.attention.call import LayerState
    from act_export.attention.hook import HookedModel

EXPORTED = "act-export"
FOREIGN = "another exporter"
PYTORCH = "PyTorch"


@dataclass(frozen=True)
class Contender:
    """One model, and how it is run.

    Attributes:
        name: In the report.
        kind: `EXPORTED`, `FOREIGN` or `PYTORCH`.
        source: The ONNX file, or MODEL as `act_export.checkpoint.load_checkpoint` takes it.
        kernel: What computes the attention, in words.
        native: Whether the native library does, in a file of act-export.
        rounds: Turns that it takes.
        new_tokens: That it generates in a turn.
        calibration: Of PyTorch: the file whose calibration it applies; empty for the others.
        device: "cpu", "cuda" or "cuda:N".
        revision: Of PyTorch's MODEL on the hub; None where it has none.
        trust_remote_code: Of PyTorch: whether code that comes with the checkpoint may run.
        notes: What else a reader of the numbers must know.
        choice: Of a file of act-export: one of its calibrations, or a calibration file or an adapter; empty for its
            default.
    """

    name: str
    kind: str
    source: str
    kernel: str
    native: bool
    rounds: int
    new_tokens: int
    calibration: str = ""
    device: str = "cpu"
    revision: str | None = None
    trust_remote_code: bool = False
    notes: tuple[str, ...] = ()
    choice: str = ""


class Running(ABC):
    """A loaded model with the cache of one batch."""

    weights_bytes: int

    @abstractmethod
    def begin(self, batch: int, capacity: int) -> None:
        """Empties the cache, and reserves room for so many positions where the contender can."""

    @abstractmethod
    def step(self, input_ids: NDArray[np.int64]) -> NDArray[Any]:
        """One forward pass that extends the cache; the last position's logits, (batch, vocabulary)."""


@contextmanager
def running(contender: Contender, threads: int) -> Iterator[Running]:
    """Loads a contender; ONNX Runtime's global thread pool must have been made, PyTorch gets so many threads.

    Raises:
        ActExportError: If it can't be loaded, or isn't the model that its calibration is of.
    """
    if contender.kind == PYTORCH:
        with _running_pytorch(contender, threads) as model:
            yield model
    elif contender.kind == FOREIGN:
        yield RunningForeign(read_model_file(contender.source), Device.parse(contender.device))
    else:
        with Session.open(
            contender.source,
            native=contender.native,
            shared_threads=True,
            device=contender.device,
            calibration=contender.choice or DEFAULT,
        ) as session:
            yield RunningExported(session, read_model_file(contender.source).weights_bytes)


def placement(contender: Contender) -> NodePlacement | None:
    """Where the nodes of a contender run, by loading it and running two tokens; None for PyTorch.

    ONNX Runtime's global thread pool must have been made.

    Raises:
        ActExportError: If it can't be loaded or run.
    """
    if contender.kind == PYTORCH:
        return None
    file = read_model_file(contender.source)
    if contender.kind == EXPORTED:
        return placement_of(file.path, native=contender.native, device=contender.device, shared_threads=True)
    device = Device.parse(contender.device)

    def run(inner: Any) -> None:
        model = RunningForeign(file, device, inner)
        model.begin(1, 2)
        model.step(np.zeros((1, 2), np.int64))

    return profile_run(
        lambda options: load_inner(file.path, options, device, native=False), run, str(device), shared_threads=True
    )


class RunningExported(Running):
    """A file of act-export as `act_export.runtime.generate` runs it."""

    def __init__(self, session: Session, weights_bytes: int) -> None:
        """Takes an open session."""
        self.weights_bytes = weights_bytes
        self._session = session
        self._cache: Cache | None = None

    def begin(self, batch: int, capacity: int) -> None:
        """See `Running`."""
        self._cache = None  # the old one goes before the new one comes
        self._cache = self._session.allocate(batch, capacity)

    def step(self, input_ids: NDArray[np.int64]) -> NDArray[Any]:
        """See `Running`."""
        assert self._cache is not None
        return self._cache.step(input_ids)[:, -1]


class RunningForeign(Running):
    """Another exporter's file.

    Where its attention is GroupQueryAttention, past and present are the same preallocated memory, as onnxruntime-genai
    runs it; otherwise each call's present is the next one's past. Nothing is copied by us in either case.
    """

    def __init__(self, file: ModelFile, device: Device, inner: Any = None) -> None:
        """Takes an `onnxruntime.InferenceSession`, or opens one in the global thread pool."""
        self.weights_bytes = file.weights_bytes
        self._file = file
        self._device = device
        if inner is None:
            options = import_onnxruntime().SessionOptions()
            options.use_per_session_threads = False
            inner = load_inner(file.path, options, device, native=False)
        self._inner = inner
        self._memory = DeviceMemory(device, shared_threads=True) if device.is_cuda else None
        self._binding: Any = None
        self._alive: list[Any] = []  # what is bound by address
        self._length = 0

    def begin(self, batch: int, capacity: int) -> None:
        """See `Running`."""
        self._binding, self._alive, self._length = self._inner.io_binding(), [], 0
        for part in self._file.state_inputs:
            where = self._reserve(part, batch, capacity if self._file.shares_buffers else 0)
            self._binding.bind_input(part.name, *where)
            if self._file.shares_buffers:
                self._binding.bind_output(part.present, *where)

    def step(self, input_ids: NDArray[np.int64]) -> NDArray[Any]:
        """See `Running`."""
        batch, sequence = input_ids.shape
        total = self._length + sequence
        given = {
            "input_ids": input_ids,
            "attention_mask": np.ones((batch, total), np.int64),
            "position_ids": np.broadcast_to(np.arange(self._length, total), (batch, sequence)),
        }
        alive = [np.ascontiguousarray(given[name], dtype) for name, dtype in self._file.inputs.items()]
        for name, array in zip(self._file.inputs, alive, strict=True):
            self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        logits = np.empty((batch, sequence, self._file.vocabulary), self._file.logits_dtype)
        where = ("cpu", 0, bound_type(logits.dtype), logits.shape, logits.ctypes.data)
        self._binding.bind_output("logits", *where)
        if not self._file.shares_buffers:
            for part in self._file.state_inputs:
                self._binding.bind_output(part.present, self._device.kind, self._device.index)
        try:
            self._inner.run_with_iobinding(self._binding)
        except Exception as error:  # ONNX Runtime's errors have no common base
            raise SessionError(f"ONNX Runtime can't run {self._file.path}: {error}") from error
        if not self._file.shares_buffers:
            self._hand_present_on()
        self._length = total
        return logits[:, -1]

    def _reserve(self, part: StateInput, batch: int, tokens: int) -> tuple[Any, ...]:
        """Zeros for a part of the state, as bindings take them."""
        shape, dtype = part.shape(batch, tokens), bound_type(part.dtype)
        if self._memory is None or not tokens:
            array = part.zeros(batch, tokens)
            self._alive.append(array)
            return "cpu", 0, dtype, shape, array.ctypes.data
        buffer = self._memory.zeros(batch * part.heads, tokens * part.size * part.dtype.itemsize)
        self._alive.append(buffer)
        return self._device.kind, self._device.index, dtype, shape, buffer.address

    def _hand_present_on(self) -> None:
        _, *present = self._binding.get_outputs()  # in the order they were bound: logits first, then the states
        for part, value in zip(self._file.state_inputs, present, strict=True):
            self._binding.bind_ortvalue_input(part.name, value)


class RunningPyTorch(Running):
    """A transformers model whose attention is the reference."""

    def __init__(self, hooked: HookedModel) -> None:
        """Takes a model under `act_export.attention.hook.attention_hook`."""
        self.weights_bytes = sum(tensor.numel() * tensor.element_size() for tensor in hooked.model.parameters())
        self._hooked = hooked
        self._state: list[LayerState] | None = None
        self._length = 0

    def begin(self, batch: int, capacity: int) -> None:
        """See `Running`; the reference joins its cache, so there is no room to reserve."""
        self._state, self._length = None, 0

    def step(self, input_ids: NDArray[np.int64]) -> NDArray[Any]:
        """See `Running`."""
        import torch

        self._length += input_ids.shape[1]
        device = self._hooked.model.device
        mask = torch.ones((len(input_ids), self._length), dtype=torch.long, device=device)
        with torch.inference_mode():
            ids = torch.from_numpy(input_ids).to(device)
            outputs = self._hooked(ids, mask, self._state, logits_to_keep=1)
        self._state = outputs.state
        logits: NDArray[Any] = outputs.logits[:, -1].float().cpu().numpy()
        return logits


@contextmanager
def _running_pytorch(contender: Contender, threads: int) -> Iterator[Running]:
    import torch

    from act_export.attention.hook import attention_hook
    from act_export.attention.reference_attention import ReferenceAttention
    from act_export.checkpoint.load import load_checkpoint

    torch.set_num_threads(threads)
    file = read_model_file(contender.calibration)
    device = contender.device if Device.parse(contender.device).is_cuda else None
    checkpoint = load_checkpoint(
        contender.source,
        dtype=file.precision,
        device=device,
        revision=contender.revision,
        trust_remote_code=contender.trust_remote_code,
    )
    if file.identity is not None and file.identity != checkpoint.identity:
        raise ActExportError(
            f"{file.path} was exported from another model: {file.identity}, and {contender.source} is "
            f"{checkpoint.identity}"
        )
    attention = ReferenceAttention(file.record.calibration)
    with attention_hook(checkpoint.model, attention) as hooked:
        yield RunningPyTorch(hooked)
