"""Weights named after the module that they belong to."""

from __future__ import annotations

import ast

import onnx_ir as ir

_SCOPES = "pkg.torch.onnx.name_scopes"


class NameWeightsPass(ir.passes.InPlacePass):
    """Gives folded weights (`val_12`) the name of their module, and drops the wrapper's prefix from the others.

    torch's exporter stores most matrices transposed, under a number; the name of such a weight ends in
    `.weight_transposed`. Where the module can't be told, the number stays.
    """

    def __init__(self, prefix: str) -> None:
        """Takes the prefix to drop, e.g. "model."."""
        super().__init__()
        self.prefix = prefix

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Renames initializers; inputs and outputs keep their names."""
        for value in list(model.graph.initializers.values()):
            name = _module_of(value) if str(value.name).startswith("val_") else str(value.name)
            if name is None:
                continue
            name = name.removeprefix(self.prefix)
            if name != value.name and name not in model.graph.initializers:
                value.name = name
        return ir.passes.PassResult(model, modified=True)


def _module_of(value: ir.Value) -> str | None:
    users = [node for node, _ in value.uses()]
    if len(users) != 1 or users[0].op_type != "MatMul":
        return None
    scopes = ast.literal_eval(users[0].metadata_props.get(_SCOPES, "[]"))
    return f"{scopes[-2]}.weight_transposed" if len(scopes) > 1 and scopes[-2] else None
