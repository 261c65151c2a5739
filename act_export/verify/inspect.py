"""What is baked into an exported file, read from the graph without its weights."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from act_export.calibration import Calibration, ModelIdentity
from act_export.errors import ActExportError
from act_export.onnx_file import load_without_weights
from act_export.runtime.graph_state import declared_shape
from act_export.runtime.packed_state import PROPERTY, PackedState
from act_export.runtime.session import model_file
from act_export.runtime.token_input import EMBEDDINGS, POSITIONS


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
        revision: Hash of the hub's commit that it was made from; empty where it wasn't from the hub.
        architecture: Model type.
        num_layers: Attention layers.
        num_heads: Query heads per layer.
        identity: The model that it was exported from, as calibrations name it.
        precision: How weights, activations and cache are stored; int8 and int4 are of weights.
        accuracy_level: Of int8 and int4, see `act_export.export.quantize.Quantization`; None of others.
        block_size: The same.
        opset: Version of the standard operators.
        nodes: Number of nodes.
        operators: Number of nodes of each attention operator.
        weights_bytes: Size of the external data.
        calibration: Baked in; None for a plain export.
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
    weights_bytes: int
    calibration: Calibration | None
    accuracy_level: int | None = None
    block_size: int | None = None
    pads_left: bool = True
    sink_state: tuple[str, ...] = ()
    revision: str = ""
    family: str = ""
    embedding_size: int | None = None
    position_axes: int = 1

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
    properties = {entry.key: entry.value for entry in model.metadata_props}
    if "act_export.version" not in properties:
        raise ActExportError(f"{file} has no act-export metadata; it wasn't written by act-export")
    identity = json.loads(properties["act_export.model"])
    text = properties.get("act_export.calibration")
    locations = {
        entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    data = [file.parent / location for location in locations]
    shapes = {given.name: declared_shape(given) for given in model.graph.input}
    return Inspection(
        path=file,
        version=properties["act_export.version"],
        source=properties["act_export.source"],
        architecture=identity["architecture"],
        num_layers=identity["num_layers"],
        num_heads=identity["num_heads"],
        identity=ModelIdentity(**identity),
        precision=properties.get("act_export.dtype", "float32"),  # files of earlier versions don't say
        opset=next(opset.version for opset in model.opset_import if opset.domain == ""),
        nodes=len(model.graph.node),
        operators=dict(Counter(f"{node.domain}.{node.op_type}" for node in model.graph.node if node.domain)),
        weights_bytes=sum(place.stat().st_size for place in data if place.is_file()),
        calibration=Calibration.from_json(text, source=str(file)) if text else None,
        accuracy_level=_number(properties, "accuracy_level"),
        block_size=_number(properties, "block_size"),
        pads_left=json.loads(properties.get("act_export.graft", "{}")).get("pads_left", True),
        sink_state=_sink_state(properties, model.graph),
        revision=properties.get("act_export.revision", ""),
        family=properties.get("act_export.family", ""),
        embedding_size=shapes[EMBEDDINGS][-1] if EMBEDDINGS in shapes else None,
        position_axes=shapes[POSITIONS][0] or 1 if len(shapes.get(POSITIONS, ())) == 3 else 1,
    )


def _number(properties: Mapping[str, str], name: str) -> int | None:
    text = properties.get(f"act_export.{name}")
    return int(text) if text is not None else None


def _sink_state(properties: Mapping[str, str], graph: onnx.GraphProto) -> tuple[str, ...]:
    packed = properties.get(f"act_export.{PROPERTY}")
    if packed is not None:
        return PackedState.from_json(packed).inputs
    grafted: list[str] = json.loads(properties.get("act_export.graft", "{}")).get("inputs", [])
    return tuple(grafted or (given.name for given in graph.input if given.name.startswith("past_sink_scores.")))
