"""One name for each dimension, whatever torch's exporter calls it."""

from __future__ import annotations

import re
from collections.abc import Mapping

import onnx_ir as ir

_SYMBOL = re.compile(r"[A-Za-z_]\w*")


class NameDimensionsPass(ir.passes.InPlacePass):
    """Names the dimensions of inputs and outputs, and what in between has the same lengths.

    The exporter calls them `s44`, gives every tensor of the cache a batch of its own where nothing in the graph
    compares them, and writes sums as it met them.
    """

    def __init__(self, names: Mapping[str, Mapping[int, str]]) -> None:
        """Takes, by input or output, the names of its dynamic dimensions, by their places."""
        super().__init__()
        self.names = names

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Renames; dimensions that are numbers stay."""
        graph = model.graph
        found: dict[str, str] = {}
        for value in (*graph.inputs, *graph.outputs):
            for place, name in self.names.get(value.name or "", {}).items():
                dimension = value.shape[place] if value.shape is not None else None
                if isinstance(dimension, ir.SymbolicDim) and dimension.value is not None:
                    found.setdefault(dimension.value, name)
        for value in (*graph.inputs, *(output for node in model.graph.all_nodes() for output in node.outputs)):
            if value.shape is not None:
                value.shape = ir.Shape([_renamed(dimension, found) for dimension in value.shape])
        for value in graph.outputs:
            named = self.names.get(value.name or "", {})
            if value.shape is not None:
                value.shape = ir.Shape([named.get(place, dimension) for place, dimension in enumerate(value.shape)])
        return ir.passes.PassResult(model, modified=True)


def _renamed(dimension: int | ir.SymbolicDim, names: Mapping[str, str]) -> int | ir.SymbolicDim:
    if not isinstance(dimension, ir.SymbolicDim) or dimension.value is None:
        return dimension
    whole = names.get(dimension.value)
    return ir.SymbolicDim(whole or _SYMBOL.sub(lambda symbol: names.get(symbol[0], symbol[0]), dimension.value))
