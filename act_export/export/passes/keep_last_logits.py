"""An optional input that says how many last positions to compute logits for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from act_export.errors import ActExportError

INPUT = "logits_to_keep"
_OUTPUT = "logits"
_LENGTH = "logits_length"
_END = np.iinfo(np.int64).max
_ELEMENTWISE = {
    *("Abs", "Add", "Cast", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "Identity"),
    *("LeakyRelu", "Log", "Max", "Min", "Mish", "Mul", "Neg", "Pow", "Reciprocal", "Relu", "Selu", "Sigmoid"),
    *("Softplus", "Softsign", "Sqrt", "Sub", "Swish", "Tanh"),
}
_AXIS_DEFAULTS = {"LayerNormalization": -1, "LogSoftmax": -1, "RMSNormalization": -1, "Softmax": -1, "Split": 0}
_REDUCTIONS = {"ReduceMax", "ReduceMean", "ReduceSum", "ReduceSumSquare"}
_OF_CONSTANTS = {"Cast", "Constant", "Identity", "Transpose"}


class KeepLastLogitsPass(ir.passes.InPlacePass):
    """Adds the input `logits_to_keep`: 0 computes the logits of every position, n only those of the last n.

    The input is an int64 scalar with the initializer 0, so it needn't be given, and callers that don't know it get what
    they always got. transformers' models have a parameter of this name and meaning.

    Whatever lies between the last attention and the logits and treats every position by itself then runs on the kept
    positions alone: the last layer's feed-forward network, the last norm, the product with the vocabulary, its bias,
    cap and scale. That is found by walking back from the logits over operators known to work position by position. The
    first others, mostly the last attention and the residual stream beside it, run on all positions, and their results
    are sliced; so is a result that has other uses. If the very operator that makes the logits isn't known, the logits
    are sliced: right, though nothing is saved.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the main graph, which must be sorted and have `logits` (batch, sequence, vocabulary).

        Raises:
            ActExportError: If it doesn't have such an output, or has an input of this name.
        """
        graph = model.graph
        logits = next((value for value in graph.outputs if value.name == _OUTPUT), None)
        if logits is None or not _has_named_positions(logits):
            shape = None if logits is None else logits.shape
            raise ActExportError(f"logits have shape {shape}; expected (batch, sequence, vocabulary)")
        if any(value.name == INPUT for value in graph.inputs):
            raise ActExportError(f"the graph has an input {INPUT} already")
        region = _region(graph, logits)
        kept = _Kept(graph)
        for node in region:
            for index, value in enumerate(node.inputs):
                if value is not None and _has_positions(value, logits) and value.producer() not in region:
                    node.replace_input_with(index, kept.rows_of(value))
        for node in region:
            for value in node.outputs:
                value.shape = _kept_shape(value)
        if not region:
            whole = kept.rows_of(logits)
            logits.name, whole.name = f"{_OUTPUT}_of_all_positions", _OUTPUT
            graph.outputs[graph.outputs.index(logits)] = whole
        return ir.passes.PassResult(model, modified=True)


class _Kept:
    """The last positions of values, one Slice each."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._rows: dict[ir.Value, ir.Value] = {}
        count = _constant(graph, INPUT, 0)
        graph.inputs.append(count)
        # From -n, the n-th last position; from -0, the first. The zero comes from a shape: ONNX Runtime keeps such
        # arithmetic on the CPU, where Slice wants its bounds, and a GPU needn't be waited for.
        length = ir.node("Shape", [graph.inputs[0]], {"start": 0, "end": 1})
        zero = ir.node("Mul", [length.outputs[0], _constant(graph, f"{INPUT}_none", [0])])
        self._start = ir.node("Sub", [zero.outputs[0], count])
        nodes = (length, zero, self._start)
        for node in nodes:
            node.outputs[0].type, node.outputs[0].shape = count.type, ir.Shape([1])
        graph.insert_before(graph[0], nodes)
        end, axis = _constant(graph, f"{INPUT}_end", [_END]), _constant(graph, f"{INPUT}_axis", [1])
        self._bounds = (self._start.outputs[0], end, axis)

    def rows_of(self, value: ir.Value) -> ir.Value:
        if value not in self._rows:
            node = ir.node("Slice", [value, *self._bounds])
            rows = node.outputs[0]
            rows.name, rows.type, rows.shape = f"{value.name}_kept", value.type, _kept_shape(value)
            self._graph.insert_after(value.producer() or self._start, node)
            self._rows[value] = rows
        return self._rows[value]


def _region(graph: ir.Graph, logits: ir.Value) -> dict[ir.Node, None]:
    """The nodes that compute nothing but logits, each position by itself, the last first."""
    region: dict[ir.Node, None] = {}
    for node in reversed(graph):
        used = [value for value in node.outputs if value is logits or value.uses() or value.is_graph_output()]
        if used and all(_only_serves(value, region, logits) for value in used) and _is_positionwise(node, logits):
            region[node] = None
    return region


def _only_serves(value: ir.Value, region: dict[ir.Node, None], logits: ir.Value) -> bool:
    return (value is logits or not value.is_graph_output()) and all(user in region for user, _ in value.uses())


def _is_positionwise(node: ir.Node, logits: ir.Value) -> bool:
    """Whether each position of the outputs depends on the same position of the inputs alone."""
    inputs = [value for value in node.inputs if value is not None]
    rows = [value for value in inputs if _has_positions(value, logits)]
    others = [value for value in inputs if not _has_positions(value, logits)]
    if node.domain != "" or not rows or not all(_has_positions(value, logits) for value in node.outputs):
        return False
    if not all(_is_constant(value) for value in others):
        return False
    if node.op_type == "MatMul":
        return inputs[0] in rows and len(others) == 1 and _rank(others[0]) == 2
    if node.op_type in _REDUCTIONS:
        return inputs[0] in rows and len(others) == 1 and _is_last_axis(others[0])
    if node.op_type in _AXIS_DEFAULTS:
        axis = node.attributes.get_int("axis", _AXIS_DEFAULTS[node.op_type])
        return axis in (-1, 2) and rows == inputs[:1] and all(_rank(value) == 1 for value in others)
    return node.op_type in _ELEMENTWISE and all(_is_same_everywhere(value) for value in others)


def _has_named_positions(logits: ir.Value) -> bool:
    """Whether (batch, sequence, ..), with a name for the sequence: dimensions without one are all alike."""
    if logits.shape is None or len(logits.shape) != 3 or isinstance(logits.shape[1], int):
        return False
    return ir.SymbolicDim(None) not in (logits.shape[0], logits.shape[1])


def _has_positions(value: ir.Value, logits: ir.Value) -> bool:
    """Whether a value is (batch, sequence, anything), with the batch and the sequence of the logits."""
    if value.shape is None or logits.shape is None or len(value.shape) != 3:
        return False
    return bool(value.shape[0] == logits.shape[0] and value.shape[1] == logits.shape[1])


def _is_constant(value: ir.Value) -> bool:
    if value.is_initializer():
        return not value.is_graph_input()
    return value.producer() is not None and all(node.op_type in _OF_CONSTANTS for node in _ancestors(value))


def _ancestors(value: ir.Value) -> Iterator[ir.Node]:
    node = value.producer()
    if node is None:
        return
    yield node
    for source in node.inputs:
        if source is not None:
            yield from _ancestors(source)


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


def _is_same_everywhere(constant: ir.Value) -> bool:
    """Whether a constant that is broadcast against (batch, sequence, anything) is the same at each position."""
    if constant.shape is None or len(constant.shape) > 3:
        return False
    return len(constant.shape) < 2 or constant.shape[-2] == 1


def _is_last_axis(axes: ir.Value) -> bool:
    tensor = axes.const_value
    return tensor is not None and tensor.numpy().tolist() in ([-1], [2])


def _kept_shape(value: ir.Value) -> ir.Shape:
    assert value.shape is not None  # (batch, sequence, anything), by `_has_positions`
    return ir.Shape([value.shape[0], _LENGTH, value.shape[2]])


def _constant(graph: ir.Graph, name: str, values: int | list[int]) -> ir.Value:
    tensor = ir.tensor(values, dtype=ir.DataType.INT64, name=name)
    shape = ir.Shape([len(values)] if isinstance(values, list) else [])
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
