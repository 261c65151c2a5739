"""A bfloat16 model for ONNX Runtime's CPU provider, which has next to no bfloat16 kernels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import onnx_ir as ir

from act_export.errors import ActExportError
from act_export.onnx_file.load import load_graph
from act_export.staging import staging_file

_FLOAT, _BFLOAT16 = ir.DataType.FLOAT, ir.DataType.BFLOAT16


class RoundAfterOperatorsPass(ir.passes.InPlacePass):
    """Has each standard operator on bfloat16 compute in float32, between Casts that round its results to bfloat16.

    That is what ONNX Runtime itself does with float16 on a CPU. Weights and whatever passes between operators are
    bfloat16 as before, and so are inputs and outputs of operators of other domains, the attention among them. The
    graph's own inputs and outputs, a cache that the attention alone reads and writes, become float32, which holds every
    bfloat16 number.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the main graph."""
        graph = model.graph
        widened: dict[ir.Value, ir.Value] = {}
        for node in list(graph):
            if node.domain == "" and node.op_type != "Cast":
                _compute_in_float32(graph, node, widened)
        for value in graph.inputs:
            if value.dtype == _BFLOAT16:
                users = list(value.uses())
                value.type = ir.TensorType(_FLOAT)
                _redirect(users, _cast(graph, value, _BFLOAT16))
        for index, value in enumerate(graph.outputs):
            if value.dtype == _BFLOAT16:
                name, value.name = value.name, f"{value.name}_rounded"
                graph.outputs[index] = _cast(graph, value, _FLOAT)
                graph.outputs[index].name = name
        return ir.passes.PassResult(model, modified=True)


def _compute_in_float32(graph: ir.Graph, node: ir.Node, widened: dict[ir.Value, ir.Value]) -> None:
    for index, value in enumerate(node.inputs):
        if value is not None and value.dtype == _BFLOAT16:
            if value not in widened:
                widened[value] = _cast(graph, value, _FLOAT)
            node.replace_input_with(index, widened[value])
    for value in node.outputs:
        if value.dtype == _BFLOAT16:
            users = list(value.uses())
            value.type = ir.TensorType(_FLOAT)
            _redirect(users, _cast(graph, value, _BFLOAT16))


def _cast(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    cast = ir.node("Cast", [value], {"to": dtype})
    cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(dtype), value.shape
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], cast)
    else:
        graph.insert_after(producer, cast)
    return cast.outputs[0]


def _redirect(uses: Iterable[tuple[ir.Node, int]], value: ir.Value) -> None:
    for node, index in uses:
        node.replace_input_with(index, value)


@contextmanager
def runnable_on_cpu(path: Path) -> Iterator[Path]:
    """A stand-in for a bfloat16 file, beside it and over the same weights, for as long as the block runs.

    Raises:
        ActExportError: If it can't be written there.
    """
    model = load_graph(path)
    RoundAfterOperatorsPass()(model)
    with ExitStack() as stack:
        try:
            file = stack.enter_context(staging_file(path.parent, path.name))
            ir.save(model, file, format="protobuf")
        except OSError as error:
            raise ActExportError(
                f"{path} is bfloat16, which ONNX Runtime runs on a CPU only with another graph beside the file, and "
                f"there none can be written: {error.strerror}; copy the model to a folder that you can write to, or "
                f"pass --device cuda"
            ) from error
        yield file
