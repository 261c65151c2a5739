"""Weights in other files, under names that are a graft's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx

from act_export.errors import ActExportError

_DATA = ".data"


def own_names(data: Sequence[str], out: Path) -> dict[str, str]:
    """Names for copies of the weights that are the output's own: OUT.onnx.data, or of several OUT.onnx.1.data."""
    if len(data) == 1:
        return {data[0]: f"{out.name}{_DATA}"}
    return {location: f"{out.name}.{number}{_DATA}" for number, location in enumerate(data, start=1)}


def rename_weights(model: onnx.ModelProto, names: Mapping[str, str]) -> None:
    """Has a graph look for its weights in files of other names; changed in place.

    Raises:
        ActExportError: If weights that lie in one of the files are in a node rather than among the graph's.
    """
    left = set(names)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value in names:
                left.discard(entry.value)
                entry.value = names[entry.value]
    if left:
        raise ActExportError(
            f"{min(left)} has the values of constants in nodes, so it can't be called otherwise; leave out "
            f"--copy-weights and pass --out in another folder, where it is copied to"
        )
