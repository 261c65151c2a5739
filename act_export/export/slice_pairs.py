"""onnxscript's rule that makes one Split of two Slices, without its search through the whole graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.rules import common

from act_export.export.passes.shapes import width


@contextmanager
def quick_slice_pairs() -> Iterator[None]:
    """Has the rule look at those Slices alone that can have a partner, within the block; it finds the same.

    For each node it goes through all others, a third of exporting a model of 30 layers. Where onnxscript has no rule of
    this name, nothing is done.
    """
    rule: Any = getattr(common, "slice_split_rule", None)
    if rule is None:
        yield
        return
    search = rule.try_rewrite

    def try_rewrite(model: ir.Model, graph: ir.Graph | ir.Function, node: ir.Node, **options: Any) -> Any:
        return search(model, graph, node, **options) if _may_have_partner(node) else None

    rule.try_rewrite = try_rewrite
    try:
        yield
    finally:
        vars(rule).pop("try_rewrite", None)


def _may_have_partner(node: ir.Node) -> bool:
    """Whether a node is a Slice of what another Slice takes up to the last element, by its number, as the rule asks."""
    if node.op_type != "Slice" or not node.inputs:
        return False
    whole = node.inputs[0]
    return whole is not None and any(
        user.op_type == "Slice" and _single(user.inputs[2]) == width(whole) for user in whole.consumers()
    )


def _single(value: ir.Value | None) -> int | None:
    numbers = value.const_value if value is not None else None
    return int(numbers.numpy().reshape(-1)[0]) if numbers is not None and numbers.size == 1 else None
