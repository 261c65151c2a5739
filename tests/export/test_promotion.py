"""Casts that the exporter writes for mixed types, with nodes that aren't run again."""

from __future__ import annotations

from contextlib import nullcontext

import onnx_ir as ir
import pytest
import torch
from torch.onnx._internal.fx.passes import type_promotion

from act_export.export.promotion import quick_type_promotion


class Mixed(torch.nn.Module):
    """Whole numbers, halves, truth values and plain numbers among each other, in several steps."""

    def forward(self, x: torch.Tensor, half: torch.Tensor, whole: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rooted = x / whole.sqrt() + half
        counted = (whole * 2).sum(-1, keepdim=True) + (x > 0)
        counted = counted * x.shape[0] / whole.shape[0]
        return rooted.pow(2).mean(-1), counted * 0.5, (whole > 1).sum(-1) + rooted.clamp(min=1).sum(-1)


def test_the_same_graph_from_fewer_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    example = (torch.ones(2, 3), torch.ones(2, 3, dtype=torch.half), torch.ones(2, 3, dtype=torch.int32))
    run: list[str] = []
    interpreter = type_promotion._TypePromotionInterpreter

    def call_function(self, target, *given):
        run.append(str(target))
        return torch.fx.Interpreter.call_function(self, target, *given)

    monkeypatch.setattr(interpreter, "call_function", call_function, raising=False)

    def graph_of(promotion) -> tuple[bytes, int]:
        run.clear()
        with promotion:
            program = torch.onnx.export(
                Mixed(), example, dynamo=True, verbose=False, optimize=False, dynamic_shapes=({0: "batch"},) * 3
            )
        return ir.to_proto(program.model.graph).SerializeToString(deterministic=True), len(run)

    before = interpreter.run_node
    as_torch, all_runs = graph_of(nullcontext())
    quick, runs = graph_of(quick_type_promotion())
    assert quick == as_torch
    assert 0 < runs <= all_runs - 20  # nodes without a cast
    assert interpreter.run_node is before
