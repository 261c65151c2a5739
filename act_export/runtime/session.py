"""An ONNX Runtime session over an exported model, with its cache and sink state."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from act_export.calibration import Calibration, ModelIdentity
from act_export.errors import ActExportError
from act_export.ops.library import LibraryNotFoundError, library_path
from act_export.runtime.providers import import_onnxruntime

State = dict[str, NDArray[Any]]
"""The cache and the running column sums by the names of the graph's inputs; batch is axis 0, tokens are axis 2."""

_STATE_INPUTS = {"past_key_values.": "present.", "past_sink_scores.": "present_sink_scores."}
_DTYPES: dict[str, np.dtype[Any]] = {"tensor(float)": np.dtype(np.float32), "tensor(float16)": np.dtype(np.float16)}


class SessionError(ActExportError):
    """A file that ONNX Runtime can't run as an act-export model."""


class RunOutputs(NamedTuple):
    """Result of one run.

    Attributes:
        logits: (batch, sequence, vocabulary).
        state: For the next run.
    """

    logits: NDArray[np.float32]
    state: State


@dataclass(frozen=True)
class Limits:
    """What the model can take, and where generation ends.

    Attributes:
        vocabulary: Number of token ids; None if it isn't recorded.
        context: Largest number of tokens of a sequence; None if there is none.
        stop_tokens: Generation ends after one of these.
    """

    vocabulary: int | None = None
    context: int | None = None
    stop_tokens: tuple[int, ...] = ()

    @classmethod
    def from_json(cls, text: str) -> Limits:
        """Reads the file's record."""
        fields = json.loads(text)
        return cls(fields.get("vocabulary"), fields.get("context"), tuple(fields.get("stop_tokens", ())))


class Session:
    """An exported model, ready to run.

    Attributes:
        path: The ONNX file.
        native: Whether the native library runs the attention, rather than the portable functions.
        properties: The file's act-export metadata, without its prefix.
    """

    def __init__(self, path: Path, inner: Any, *, native: bool) -> None:
        """Wraps an `onnxruntime.InferenceSession`; use `open`."""
        self.path = path
        self.native = native
        self._inner = inner
        self.properties: dict[str, str] = {
            key.removeprefix("act_export."): value
            for key, value in inner.get_modelmeta().custom_metadata_map.items()
            if key.startswith("act_export.")
        }
        self._state_inputs = [i for i in inner.get_inputs() if i.name.startswith(tuple(_STATE_INPUTS))]
        self._outputs = ["logits", *(_present_name(i.name) for i in self._state_inputs)]
        self._limits = Limits.from_json(self.properties.get("limits", "{}"))
        if not self._state_inputs or "logits" not in {o.name for o in inner.get_outputs()}:
            raise SessionError(f"{path} has no logits or no past_key_values; is it a model that act-export wrote?")

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        native: bool = True,
        threads: int | None = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> Session:
        """Loads a model.

        Args:
            path: The ONNX file, or the folder that has it as `model.onnx`.
            native: Register the native library; otherwise the model's portable functions run.
            threads: Number of threads within an operator; None leaves it to ONNX Runtime.
            providers: Execution providers, first choice first.

        Raises:
            SessionError: If there is no such file, ONNX Runtime refuses it, or the native library is missing.
            RuntimeNotInstalledError: If there is no ONNX Runtime, or two.
        """
        file = Path(path)
        if file.is_dir():
            file = file / "model.onnx"
        if not file.is_file():
            raise SessionError(f"there is no model {file}")
        onnxruntime = import_onnxruntime()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        if native:
            try:
                options.register_custom_ops_library(str(library_path()))
            except LibraryNotFoundError as error:
                raise SessionError(
                    f"{error}; or run the portable functions: native=False, --portable on the command line"
                ) from error
        try:
            inner = onnxruntime.InferenceSession(str(file), options, providers=list(providers))
        except Exception as error:  # ONNX Runtime's errors have no common base
            raise SessionError(f"ONNX Runtime can't load {file}: {error}") from error
        return cls(file, inner, native=native)

    @property
    def limits(self) -> Limits:
        """Vocabulary, context length and stop tokens, as recorded in the file."""
        return self._limits

    def close(self) -> None:
        """Frees the session; it can't run any more."""
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
        text = self.properties.get("calibration")
        return Calibration.from_json(text, source=str(self.path)) if text else None

    @property
    def model_identity(self) -> ModelIdentity | None:
        """The model that the file was exported from."""
        text = self.properties.get("model")
        return ModelIdentity(**json.loads(text)) if text else None

    def empty_state(self, batch: int) -> State:
        """The state before the first run."""
        state: State = {}
        for given in self._state_inputs:
            _, heads, _, size = given.shape
            state[given.name] = np.zeros((batch, int(heads), 0, int(size)), _DTYPES[given.type])
        return state

    def run(
        self,
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64],
        state: State | None = None,
        position_ids: NDArray[np.int64] | None = None,
    ) -> RunOutputs:
        """One forward pass.

        Args:
            input_ids: (batch, sequence).
            attention_mask: (batch, past + sequence), 1 for real tokens.
            state: The previous run's; None for a first run.
            position_ids: (batch, sequence); None counts the real tokens.

        Raises:
            SessionError: If shapes don't fit, a token isn't in the vocabulary, a sequence is longer than the model's
                context, or ONNX Runtime fails.
        """
        if self._inner is None:
            raise SessionError(f"the session over {self.path} was closed")
        batch, sequence = input_ids.shape
        if state is None:
            state = self.empty_state(batch)
        past = next(iter(state.values())).shape[2]
        if attention_mask.shape != (batch, past + sequence):
            raise SessionError(
                f"attention_mask has shape {attention_mask.shape}; {batch} sequences with {past} cached and {sequence} "
                f"new tokens need {(batch, past + sequence)}"
            )
        self._check_tokens(input_ids, attention_mask)
        if position_ids is None:
            position_ids = np.maximum((attention_mask != 0).cumsum(-1) - 1, 0)[:, -sequence:]
        feeds = {
            "input_ids": input_ids.astype(np.int64, copy=False),
            "attention_mask": attention_mask.astype(np.int64, copy=False),
            "position_ids": position_ids.astype(np.int64, copy=False),
            **state,
        }
        try:
            logits, *present = self._inner.run(self._outputs, feeds)
        except Exception as error:  # ONNX Runtime's errors have no common base
            raise SessionError(f"ONNX Runtime can't run {self.path}: {error}") from error
        names = [given.name for given in self._state_inputs]
        return RunOutputs(logits, dict(zip(names, present, strict=True)))

    def _check_tokens(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> None:
        if not input_ids.size:
            raise SessionError(f"input_ids has shape {input_ids.shape}; give at least one token")
        vocabulary, context = self._limits.vocabulary, self._limits.context
        lowest, highest = input_ids.min(), input_ids.max()
        if lowest < 0 or (vocabulary is not None and highest >= vocabulary):
            wrong = lowest if lowest < 0 else highest
            raise SessionError(f"token {wrong} is not in the vocabulary of {vocabulary} tokens")
        longest = int((attention_mask != 0).sum(-1).max())
        if context is not None and longest > context:
            raise SessionError(f"a sequence has {longest} tokens; the model's context holds {context}")


def select(state: State, rows: Sequence[int]) -> State:
    """The state of some sequences of a batch, in the order given; a row may be repeated."""
    return {name: value[list(rows)] for name, value in state.items()}


def _present_name(past_name: str) -> str:
    for prefix, present in _STATE_INPUTS.items():
        if past_name.startswith(prefix):
            return present + past_name.removeprefix(prefix)
    raise SessionError(f"{past_name} isn't a state input")
