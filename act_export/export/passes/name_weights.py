"""Weights named after the module that they belong to."""

from __future__ import annotations

import ast

import onnx_ir as ir

_SCOPES = "pkg.torch.onnx.name_scopes"
_SUFFIXES = {
    ("MatMul", 1): "weight_transposed",
    ("LayerNormalization", 1): "scale",
    ("RMSNormalization", 1): "scale",
    ("Gather", 0): "table",
}


class NameWeightsPass(ir.passes.InPlacePass):
    """Gives folded weights (`val_12`, `add_7`) the name of their module, and drops the wrapper's prefix from others.

    torch's exporter stores most matrices transposed, under a number; the name of such a weight ends in
    `.weight_transposed`. What it computes of a norm's weight, such as Gemma's 1 + weight, ends in `.scale`, and a table
    of a rotary embedding in `.table`. Where the module can't be told, the number stays.
    """

    def __init__(self, prefix: str) -> None:
        """Takes the prefix to drop, e.g. "model."."""
        super().__init__()
        self.prefix = prefix

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Renames initializers; inputs and outputs keep their names."""
        for value in list(model.graph.initializers.values()):
            name = str(value.name) if "." in str(value.name) else _name_by_module(value)
            if name is None:
                continue
            name = name.removeprefix(self.prefix)
            if name != value.name and name not in model.graph.initializers:
                value.name = name
        return ir.passes.PassResult(model, modified=True)


def _name_by_module(value: ir.Value) -> str | None:
    if len(value.uses()) != 1 or value.is_graph_input():
        return None
    ((node, index),) = value.uses()
    suffix = _SUFFIXES.get((node.op_type, index))
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    return f"{scopes[-2]}.{suffix}" if suffix is not None and len(scopes) > 1 and scopes[-2] else None
