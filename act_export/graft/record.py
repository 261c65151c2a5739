"""The record that a grafted file carries of what was there before, and going back to it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from act_export.graft.build import PREFIX
from act_export.graft.errors import GraftError
from act_export.ops import schema

KEY = "act_export.graft"
_FORMAT = 1


@dataclass(frozen=True)
class GraftRecord:
    """What was changed.

    Attributes:
        digest: sha256 of the model before, without the weights in other files.
        removed: Index among the nodes, and the node, in ascending order.
        inputs: Graph inputs that were added.
        outputs: Graph outputs that were added.
        functions: Functions that were added, by name.
        opsets: Domains that were added.
        metadata: Keys that were added.
        shares_buffers: Whether past and present of every layer may be the same memory, longer than what is in it.
        pads_left: Whether every layer can take padding before a sequence.
        layers: Layers that were calibrated.
        genai_config: Text of the folder's genai_config.json before; None where a file was grafted.
        had_library: Whether the folder had a native library before.
    """

    digest: str
    removed: tuple[tuple[int, onnx.NodeProto], ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    functions: tuple[str, ...]
    opsets: tuple[str, ...]
    metadata: tuple[str, ...]
    shares_buffers: bool
    pads_left: bool
    layers: tuple[int, ...]
    genai_config: str | None = None
    had_library: bool = False

    def to_json(self) -> str:
        """The text that travels in the file's metadata."""
        fields: dict[str, Any] = {
            key: value
            for key, value in ((name, getattr(self, name)) for name in self.__dataclass_fields__)
            if key != "removed"
        }
        removed = [
            [index, base64.b64encode(node.SerializeToString(deterministic=True)).decode()]
            for index, node in self.removed
        ]
        return json.dumps({"format": _FORMAT, **fields, "removed": removed})

    @classmethod
    def from_json(cls, text: str) -> GraftRecord:
        """Reads the text.

        Raises:
            GraftError: If it isn't such a record, or a later version's.
        """
        try:
            fields = dict(json.loads(text))
            if fields.pop("format") != _FORMAT:
                raise GraftError("the file was grafted by another version of act-export, which has to undo it")
            removed = tuple((index, _node(node)) for index, node in fields.pop("removed"))
            lists: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()
            }
            return cls(removed=removed, **lists)
        except (KeyError, TypeError, ValueError) as error:
            raise GraftError(f"the record of the graft can't be read: {error!r}") from error


def _node(text: str) -> onnx.NodeProto:
    try:
        node: onnx.NodeProto = onnx.NodeProto.FromString(base64.b64decode(text))
    except Exception as error:  # protobuf's errors have no base of their own
        raise ValueError(f"{text[:40]!r} isn't a node: {error}") from error
    return node


def digest(model: onnx.ModelProto) -> str:
    """sha256 of a model as protobuf writes it, without the weights in other files."""
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def record_of(model: onnx.ModelProto) -> GraftRecord | None:
    """The record in a model; None if it wasn't grafted."""
    text = next((entry.value for entry in model.metadata_props if entry.key == KEY), None)
    return GraftRecord.from_json(text) if text is not None else None


def undo(model: onnx.ModelProto) -> GraftRecord:
    """Gives a grafted model its own attention back, node for node.

    Args:
        model: Changed in place.

    Raises:
        GraftError: If it wasn't grafted, or was changed afterwards so that the result isn't what it was.
    """
    record = record_of(model)
    if record is None:
        raise GraftError("this model wasn't grafted; there is nothing to remove")
    graph = model.graph
    kept = [node for node in graph.node if not node.name.startswith(PREFIX)]
    for index, node in record.removed:
        kept.insert(index, node)
    _replace(graph.node, kept)
    _replace(graph.input, [info for info in graph.input if info.name not in record.inputs])
    _replace(graph.output, [info for info in graph.output if info.name not in record.outputs])
    _replace(
        model.functions,
        [each for each in model.functions if each.domain != schema.DOMAIN or each.name not in record.functions],
    )
    _replace(model.opset_import, [each for each in model.opset_import if each.domain not in record.opsets])
    _replace(model.metadata_props, [each for each in model.metadata_props if each.key not in record.metadata])
    if digest(model) != record.digest:
        raise GraftError(
            "without the graft the model isn't what it was: something else was changed after it was grafted; take the "
            "original file"
        )
    return record


def _replace(field: Any, values: Sequence[Any]) -> None:
    """Puts other messages into a repeated field."""
    copies = [type(value).FromString(value.SerializeToString()) for value in values]
    del field[:]
    field.extend(copies)
