"""What the graph of an ONNX language model says about running it, whoever exported it; its weights aren't read."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from act_export.calibration.file import ModelIdentity
from act_export.errors import ActExportError, SessionError
from act_export.onnx_file.external_data import data_files
from act_export.onnx_file.graph_state import (
    GROUP_QUERY_ATTENTION,
    configuration_beside,
    declared_dtype,
    declared_shape,
    present_name,
    state_input,
)
from act_export.onnx_file.load import load_without_weights, properties_of
from act_export.onnx_file.names import EMBEDDINGS, IDS, LOGITS, LOGITS_TO_KEEP, MASK, PAST_SINKS, POSITIONS, model_file
from act_export.onnx_file.record import FileRecord, Limits
from act_export.onnx_file.state import StateInput

_STATE = re.compile(r"past_key_values\.(\d+)\.(key|value)")
_GIVEN = {IDS, MASK, POSITIONS}


@dataclass(frozen=True)
class ModelFile:
    """A causal language model with a key-value cache.

    Attributes:
        path: The ONNX file.
        ours: Whether act-export wrote it.
        inputs: Token ids, mask and, if it takes them, positions; by name.
        state_inputs: Keys and values, in the graph's order; sink state isn't among them.
        vocabulary: Logits of a position.
        logits_dtype: Their type.
        last_logits: Whether the logits of the last position alone can be had of it.
        limits: Context and vocabulary, as recorded in the file or in the configuration beside it.
        attention: Number of nodes of each attention operator, by name.
        weights_bytes: Size of the file and of its external data.
        record: What the file says of itself.
    """

    path: Path
    ours: bool
    inputs: Mapping[str, np.dtype[Any]]
    state_inputs: tuple[StateInput, ...]
    vocabulary: int
    logits_dtype: np.dtype[Any]
    last_logits: bool
    limits: Limits
    attention: Mapping[str, int]
    weights_bytes: int
    record: FileRecord

    @property
    def shares_buffers(self) -> bool:
        """Whether past and present may be the same memory, longer than what is in it."""
        return self.ours or GROUP_QUERY_ATTENTION in self.attention

    @property
    def precision(self) -> str:
        """Type of the keys and values, e.g. "float16"."""
        return self.state_inputs[0].dtype.name

    @property
    def cache_shape(self) -> tuple[tuple[str, int, int], ...]:
        """Name, heads and size of the keys and values: alike in exports of the same model."""
        return tuple(sorted((part.name, part.heads, part.size) for part in self.state_inputs))

    @property
    def identity(self) -> ModelIdentity | None:
        """The model that a file of act-export was exported from."""
        return self.record.model


def read_model_file(path: str | os.PathLike[str]) -> ModelFile:
    """Reads the graph of a file, or of `model.onnx` of a folder.

    Raises:
        ActExportError: If it isn't an ONNX file, or not a language model whose inputs and outputs have optimum's names.
    """
    file = model_file(path)
    if not file.is_file():
        raise ActExportError(f"there is no model {file}")
    model = load_without_weights(file, ActExportError)
    graph = model.graph
    record = FileRecord.read(properties_of(model, file), str(file))
    ours = record.ours
    initializers = {tensor.name for tensor in graph.initializer}
    required = [given for given in graph.input if given.name not in initializers]
    known = [given for given in required if given.name in _GIVEN or _STATE.fullmatch(given.name)]
    others = [
        given.name
        for given in required
        if given not in known and not (ours and (given.name.startswith(PAST_SINKS) or given.name == EMBEDDINGS))
    ]
    logits = next((output for output in graph.output if output.name == LOGITS), None)
    outputs = {output.name for output in graph.output}
    sink_state = set(record.graft.inputs if record.graft is not None else ())  # may be layers of the cache
    states = [given for given in known if given.name not in _GIVEN and given.name not in sink_state]
    tokens = EMBEDDINGS if ours and any(given.name == EMBEDDINGS for given in required) else IDS
    missing = [name for name in (tokens, MASK) if name not in {given.name for given in required}]
    missing += [name for name in [LOGITS, *map(present_name, states)] if name not in outputs]
    if not states or logits is None or missing or others:
        problem = f"it lacks {', '.join(missing[:3])}" if missing else f"it wants {', '.join(others[:3])}"
        raise ActExportError(
            f"{file} isn't a causal language model that can be run here: "
            f"{problem if missing or others else 'it has no past_key_values'}; the inputs must be input_ids, "
            f"attention_mask, past_key_values.N.key and .value, the outputs logits, present.N.key and .value"
        )
    with _as_model_file_error():
        configuration = configuration_beside(file)
        inputs = {given.name: declared_dtype(given) for given in known if given.name in _GIVEN}
        logits_dtype = declared_dtype(logits)
    attention = [node for node in graph.node if node.op_type.endswith("Attention")]
    vocabulary = declared_shape(logits)[-1] or configuration.get("vocab_size")
    if vocabulary is None:
        raise ActExportError(
            f"can't tell the vocabulary of {file}: the shape of its logits doesn't say, and there is no "
            f"genai_config.json or config.json with vocab_size beside it"
        )
    with _as_model_file_error():
        parts = tuple(state_input(file, graph, given, configuration) for given in states)
    return ModelFile(
        path=file,
        ours=ours,
        inputs=inputs,
        state_inputs=parts,
        vocabulary=int(vocabulary),
        logits_dtype=logits_dtype,
        last_logits=ours and any(given.name == LOGITS_TO_KEEP for given in graph.input),
        limits=record.limits
        if record.limits != Limits()
        else Limits(configuration.get("vocab_size"), configuration.get("context")),
        attention={
            name: sum(node.op_type == name for node in attention) for name in sorted({n.op_type for n in attention})
        },
        weights_bytes=file.stat().st_size + sum(data_files(file, missing=True).values()),
        record=record,
    )


@contextmanager
def _as_model_file_error() -> Iterator[None]:
    try:
        yield
    except SessionError as error:
        raise ActExportError(str(error)) from error
