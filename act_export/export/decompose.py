"""Torch's exporter without its second trace, where the first has only operators that can be written as they are.

The exporter takes each program apart into simpler operators by tracing it anew, which takes nearly half of a trace. A
decoder is mostly made of operators that have translations to ONNX.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import onnxscript
import torch
from onnxscript.function_libs.torch_lib.ops import core
from torch import DispatchKey
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import ExportedProgram

Table = Mapping[Any, Callable[..., Any]]

_ATEN = torch.ops.aten
# Written as they are, though PyTorch's own decompositions don't list them.
_TRANSLATED = {_ATEN.contiguous.default, _ATEN.dropout.default, _ATEN.expand_as.default, _ATEN.unflatten.int}
_LOCK = threading.RLock()  # an export in another thread waits for this one's trace


@contextmanager
def decomposed_where_needed(own: Table) -> Iterator[None]:
    """Has `ExportedProgram.run_decompositions` return a program itself that `made_ready`.

    Args:
        own: Translations to ONNX beyond the exporter's, by operator.
    """
    with _LOCK:
        decompose: Callable[..., ExportedProgram] = ExportedProgram.run_decompositions

        def run_decompositions(
            program: ExportedProgram, decomp_table: Table | None = None, *more: Any, **named: Any
        ) -> ExportedProgram:
            if decomp_table is not None and made_ready(program, decomp_table, own):
                return program
            return decompose(program, decomp_table, *more, **named)

        ExportedProgram.run_decompositions = run_decompositions  # type: ignore[method-assign]
        try:
            yield
        finally:
            ExportedProgram.run_decompositions = decompose  # type: ignore[method-assign]


def made_ready(program: ExportedProgram, table: Table, own: Table) -> bool:
    """Whether each operator of a program can be written as it is, and none changes what it is given.

    For that, lengths that reshaping would have to find, but are known, are written out.

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
        if target is _ATEN.reshape.default:
            return _takes_known_lengths(node)
        if target is _ATEN.chunk.default:
            return _has_equal_parts(node)
        if isinstance(target, HigherOrderOperator):
            return False
        if not isinstance(target, OpOverload) or target in own:
            return True  # arithmetic of lengths, and what several outputs are taken from
        if target._schema.is_mutable or target in table:
            return False
        composite = target.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd)
        return not composite or target in _TRANSLATED or target in usual

    return all(is_written(node) for node in program.graph.nodes if node.op == "call_function")


def _takes_known_lengths(reshape: torch.fx.Node) -> bool:
    """Whether no length is left to be found, which can't be where another is 0; a known one is written out."""
    lengths = list(cast(list[Any], reshape.args[1]))
    if -1 in lengths:
        found = reshape.meta["val"].shape[lengths.index(-1)]
        if not isinstance(found, int):
            return False
        lengths[lengths.index(-1)] = found
        reshape.update_arg(1, lengths)
    return True


def _has_equal_parts(chunk: torch.fx.Node) -> bool:
    """Whether there are as many parts as were asked for, several, of the same known length."""
    parts: Any = chunk.meta["val"]
    _, count, *dimensions = cast(list[Any], chunk.args)
    dimension = dimensions[0] if dimensions else 0
    lengths = {part.shape[dimension] for part in parts}
    return len(parts) == count > 1 and len(lengths) == 1 and all(isinstance(x, int) for x in lengths)


def _flattened(shape: Sequence[Any], start: Any = 0, end: Any = -1) -> list[int] | None:
    """What flattening the last dimensions makes of a shape, for Reshape: 0 for those before. None for other ones."""
    if not shape:
        return None
    start, end = range(len(shape))[start], range(len(shape))[end]
    last = shape[start:]
    if end < len(shape) - 1 or not all(isinstance(size, int) for size in last):
        return None
    return [*[0] * start, math.prod(last)]


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """How torch's exporter writes casts, which it knows only decomposed, and flattening and reshaping, in one node."""

    def cast_to(x: Any, dtype: int, *_: Any, **__: Any) -> Any:
        return onnxscript.opset23.Cast(x, to=dtype)

    def cast_on_device(x: Any, device: Any, dtype: int, *_: Any, **__: Any) -> Any:
        return cast_to(x, dtype)

    def cast_if(x: Any, *, dtype: int | None = None, **_: Any) -> Any:
        return onnxscript.opset23.Identity(x) if dtype in (None, -1) else cast_to(x, dtype)

    def flatten(x: Any, start: int = 0, end: int = -1) -> Any:
        op = onnxscript.opset23
        shape = _flattened(x.shape, start, end)
        return op.Reshape(x, op.Constant(value_ints=shape))  # type: ignore[arg-type]

    return {
        _ATEN.to.dtype: cast_to,
        _ATEN.to.device: cast_on_device,
        _ATEN.to.dtype_layout: cast_if,
        _ATEN.flatten.using_ints: flatten,
        _ATEN.reshape.default: core.aten_view,  # where a length is 0, it is meant
    }
