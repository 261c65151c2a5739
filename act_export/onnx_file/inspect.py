"""What is baked into an exported file, read from the graph without its weights."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from act_export.calibration.calibration_set import CalibrationSet
from act_export.calibration.file import Calibration, ModelIdentity
from act_export.errors import ActExportError
from act_export.onnx_file.external_data import data_files
from act_export.onnx_file.graph_state import declared_shape
from act_export.onnx_file.load import load_without_weights, properties_of
from act_export.onnx_file.names import EMBEDDINGS, PAST_SINKS, POSITIONS, model_file
from act_export.onnx_file.record import FileRecord


@dataclass(frozen=True)
class Inspection:
    """What an exported file says of itself.

    Attributes:
        path: The ONNX file.
        version: Version of act-export that wrote it.
        source: What it was made from.
        family: Of a text tower, the model type of the vision-language model that it is of; else empty.
        embedding_size: Width of the embeddings that it takes instead of token ids; None where it takes ids.
        position_axes: Positions of a token: 1, or with M-RoPE and embeddings 3.
        calibrations: That requests can ask for; None for a plain export.
        revision: Hash of the hub's commit that it was made from; empty where it wasn't from the hub.
        architecture: Model type.
        num_layers: Attention layers.
        num_heads: Query heads per layer.
        identity: The model that it was exported from, as calibrations name it.
        precision: How weights, activations and cache are stored; int8 and int4 are of weights.
        accuracy_level: Of int8 and int4, see `act_export.onnx_file.precision.Quantization`; None of others.
        block_size: The same.
        opset: Version of the standard operators.
        nodes: Number of nodes.
        operators: Number of nodes of each attention operator.
        weights: Files that the weights lie in, relative to the file's folder, and their bytes; 0 where one is missing.
        calibration: That holds where a request doesn't say; None for plain.
        pads_left: Whether all layers leave out padding before a sequence.
        sink_state: Inputs that hold the sink state.
    """

    path: Path
    version: str
    source: str
    architecture: str
    num_layers: int
    num_heads: int
    identity: ModelIdentity
    precision: str
    opset: int
    nodes: int
    operators: Mapping[str, int]
    weights: Mapping[str, int]
    calibration: Calibration | None
    accuracy_level: int | None = None
    block_size: int | None = None
    pads_left: bool = True
    sink_state: tuple[str, ...] = ()
    revision: str = ""
    family: str = ""
    embedding_size: int | None = None
    position_axes: int = 1
    calibrations: CalibrationSet | None = None

    @property
    def weights_bytes(self) -> int:
        """Size of all of them."""
        return sum(self.weights.values())

    @property
    def takes_embeddings(self) -> bool:
        """Whether it takes embeddings instead of token ids."""
        return self.embedding_size is not None


def inspect_file(path: str | os.PathLike[str]) -> Inspection:
    """Reads a file, or `model.onnx` of a folder.

    Raises:
        ActExportError: If it isn't an ONNX file that act-export wrote.
    """
    file = model_file(path)
    if not file.is_file():
        raise ActExportError(f"there is no model {file}")
    model = load_without_weights(file)
    record = FileRecord.read(properties_of(model, file), str(file))
    if not record.ours:
        raise ActExportError(f"{file} has no act-export metadata; it wasn't written by act-export")
    if record.model is None:
        raise ActExportError(f"{file} doesn't say of which model it is; the file is damaged: write it again")
    shapes = {given.name: declared_shape(given) for given in model.graph.input}
    return Inspection(
        path=file,
        version=record.version,
        source=record.source,
        architecture=record.model.architecture,
        num_layers=record.model.num_layers,
        num_heads=record.model.num_heads,
        identity=record.model,
        precision=record.dtype,
        opset=next((opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx")), 0),
        nodes=len(model.graph.node),
        operators=dict(Counter(f"{node.domain}.{node.op_type}" for node in model.graph.node if node.domain)),
        weights=data_files(file, missing=True),
        calibration=record.calibration,
        calibrations=record.calibrations,
        accuracy_level=record.accuracy_level,
        block_size=record.block_size,
        pads_left=record.graft.pads_left if record.graft is not None else True,
        sink_state=_sink_state(record, model.graph),
        revision=record.revision,
        family=record.family,
        embedding_size=shapes[EMBEDDINGS][-1] if EMBEDDINGS in shapes else None,
        position_axes=shapes[POSITIONS][0] or 1 if len(shapes.get(POSITIONS, ())) == 3 else 1,
    )


def _sink_state(record: FileRecord, graph: onnx.GraphProto) -> tuple[str, ...]:
    if record.packed is not None:
        return record.packed.inputs
    grafted = record.graft.inputs if record.graft is not None else ()
    return grafted or tuple(given.name for given in graph.input if given.name.startswith(PAST_SINKS))
