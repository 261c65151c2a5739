"""Torch's exporter without its second trace, where the first has only operators that can be written as they are.

The exporter takes each program apart into simpler operators by tracing it anew, which is two fifths of an export. A
decoder is mostly made of operators that have translations to ONNX.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import onnxscript
import torch
from torch import DispatchKey
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import ExportedProgram

Table = Mapping[Any, Callable[..., Any]]

_ATEN = torch.ops.aten
# Written as they are, though PyTorch's own decompositions don't list them.
_TRANSLATED = frozenset(
    getattr(_ATEN, name).default for name in ("chunk", "contiguous", "dropout", "expand_as", "narrow", "reshape")
) | {_ATEN.unflatten.int}


@contextmanager
def decomposed_where_needed(own: Table) -> Iterator[None]:
    """Has `ExportedProgram.run_decompositions` return a program itself that `is_ready`.

    Args:
        own: Translations to ONNX beyond the exporter's, by operator.
    """
    decompose = ExportedProgram.run_decompositions

    def run_decompositions(program: ExportedProgram, table: Table | None = None, *more: Any) -> ExportedProgram:
        if table is not None and is_ready(program, table, own):
            return program
        decomposed: ExportedProgram = decompose(program, table, *more)
        return decomposed

    ExportedProgram.run_decompositions = run_decompositions  # type: ignore[method-assign]
    try:
        yield
    finally:
        ExportedProgram.run_decompositions = decompose  # type: ignore[method-assign]


def is_ready(program: ExportedProgram, table: Table, own: Table) -> bool:
    """Whether each operator of a program can be written as it is, and none changes what it is given.

    Args:
        program: As it was traced.
        table: What would be decomposed; operators with a translation aren't in it.
        own: Translations beyond the exporter's.
    """
    usual = torch.export.default_decompositions()

    def is_written(node: torch.fx.Node) -> bool:
        target = node.target
        if target is _ATEN.flatten.using_ints:
            return _flattened(node.args[0].meta["val"].shape, *node.args[1:]) is not None  # type: ignore[union-attr]
        if isinstance(target, HigherOrderOperator):
            return False
        if not isinstance(target, OpOverload) or target in own:
            return True  # arithmetic of lengths, and what several outputs are taken from
        if target._schema.is_mutable or target in table:
            return False
        composite = target.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd)
        return not composite or target in _TRANSLATED or target in usual

    return all(is_written(node) for node in program.graph.nodes if node.op == "call_function")


def _flattened(shape: Sequence[Any], start: Any = 0, end: Any = -1) -> list[int] | None:
    """What flattening the last dimensions makes of a shape, for Reshape: 0 for those before. None for other ones."""
    start, end = range(len(shape))[start], range(len(shape))[end]
    last = shape[start:]
    if end < len(shape) - 1 or not all(isinstance(size, int) for size in last):
        return None
    return [*[0] * start, math.prod(last)]


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """How torch's exporter writes casts, which it knows only decomposed, and flattening, in one node."""

    def cast(x: Any, dtype: int, *_: Any, **__: Any) -> Any:
        return onnxscript.opset23.Cast(x, to=dtype)

    def cast_on_device(x: Any, device: Any, dtype: int, *_: Any, **__: Any) -> Any:
        return cast(x, dtype)

    def cast_if(x: Any, *, dtype: int | None = None, **_: Any) -> Any:
        return onnxscript.opset23.Identity(x) if dtype is None else cast(x, dtype)

    def flatten(x: Any, start: int = 0, end: int = -1) -> Any:
        op = onnxscript.opset23
        shape = _flattened(x.shape, start, end)
        return op.Reshape(x, op.Constant(value_ints=shape))  # type: ignore[arg-type]

    return {
        _ATEN.to.dtype: cast,
        _ATEN.to.device: cast_on_device,
        _ATEN.to.dtype_layout: cast_if,
        _ATEN.flatten.using_ints: flatten,
    }
