"""The record that a grafted file carries of what was there before, and going back to it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import onnx

from act_export.errors import ActExportError, others_errors
from act_export.graft.weights import rename_weights
from act_export.onnx_file.names import CALIBRATION
from act_export.onnx_file.node_builder import PREFIX
from act_export.onnx_file.record import GRAFT, GraftRecord
from act_export.ops import schema


def digest(model: onnx.ModelProto) -> str:
    """sha256 of a model as protobuf writes it, without the weights in other files."""
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def record_of(model: onnx.ModelProto) -> GraftRecord | None:
    """The record in a model; None if it wasn't grafted."""
    text = next((entry.value for entry in model.metadata_props if entry.key == GRAFT), None)
    return GraftRecord.from_json(text) if text is not None else None


def removed_nodes(record: GraftRecord) -> list[tuple[int, onnx.NodeProto]]:
    """Index among the nodes, and the node, in ascending order; ActExportError where one can't be read."""
    with others_errors("a node in the record of the graft can't be read"):
        return [(index, onnx.NodeProto.FromString(node)) for index, node in record.removed]


def undo(model: onnx.ModelProto) -> GraftRecord:
    """Gives a grafted model its own attention back, node for node.

    Args:
        model: Changed in place.

    Raises:
        ActExportError: If it wasn't grafted, or was changed afterwards so that the result isn't what it was.
    """
    record = record_of(model)
    if record is None:
        raise ActExportError(
            "this model wasn't grafted, so there is nothing to remove; an export has the plain model inside: ask for "
            "--calibration plain, or export again with --default plain"
        )
    graph = model.graph
    kept = [node for node in graph.node if not node.name.startswith(PREFIX)]
    for index, node in removed_nodes(record):
        kept.insert(index, node)
    _replace(graph.node, kept)
    added = {*record.inputs, CALIBRATION}
    _replace(graph.input, [info for info in graph.input if info.name not in added])
    for index in reversed([i for i, each in enumerate(graph.initializer) if each.name == CALIBRATION]):
        del graph.initializer[index]
    _replace(graph.output, [info for info in graph.output if info.name not in record.outputs])
    _replace(
        model.functions,
        [each for each in model.functions if each.domain != schema.DOMAIN or each.name not in record.functions],
    )
    _replace(model.opset_import, [each for each in model.opset_import if each.domain not in record.opsets])
    _replace(model.metadata_props, [each for each in model.metadata_props if each.key not in record.metadata])
    rename_weights(model, record.renamed)
    if digest(model) != record.digest:
        raise ActExportError(
            "without the graft the model isn't what it was: something else was changed after it was grafted; take the "
            "original file"
        )
    return record


def _replace(field: Any, values: Sequence[Any]) -> None:
    """Puts other messages into a repeated field."""
    copies = [type(value).FromString(value.SerializeToString()) for value in values]
    del field[:]
    field.extend(copies)
