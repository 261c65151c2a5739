"""Torch's exporter without its trace for casts: what is known of a node isn't computed again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def quick_type_promotion() -> Iterator[None]:
    """Has the pass that writes type promotion as casts run the nodes alone that it changes; it writes the same.

    To know types it runs every node anew, a sixth of a trace, though each node holds the type and shape it has. Where
    torch has no such pass, nothing is done.
    """
    try:
        from torch.onnx._internal.fx.passes import type_promotion
    except ImportError:
        yield
        return
    interpreter: Any = getattr(type_promotion, "_TypePromotionInterpreter", None)
    rule_of: Any = getattr(type_promotion, "get_type_promotion_rule", None)
    methods = ("run_node", "_maybe_promote_node", "_set_current_node")
    if rule_of is None or not all(hasattr(interpreter, method) for method in methods):
        yield
        return
    run = interpreter.run_node

    def run_node(self: Any, node: torch.fx.Node) -> Any:
        if node.op != "call_function" or node.meta.get("val") is None:
            return run(self, node)
        with self._set_current_node(node):
            rule = rule_of(node, self.type_promotion_table)
            if rule is not None:
                self._maybe_promote_node(node, rule)  # where it changes something it runs what changed
        return node.meta["val"]

    interpreter.run_node = run_node
    try:
        yield
    finally:
        interpreter.run_node = run
