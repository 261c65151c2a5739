"""A float32 graph in float16 or bfloat16."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from act_export.errors import ActExportError
from act_export.ops import schema

_FLOAT = ir.DataType.FLOAT
_SINK_SCORES = "sink_scores"
_LOGITS = "logits"
_SCALING = {"Add", "Div", "Mul", "Sub", "Tanh"}
_LARGEST = {ir.DataType.FLOAT16: 65504.0, ir.DataType.BFLOAT16: 255 * 2.0**120}
_OF_ATTRIBUTES = {"Constant", "ConstantOfShape"}  # what they make is as their attribute says


class ConvertPrecisionPass(ir.passes.InPlacePass):
    """Stores weights, activations and cache in a half type; what needs float32 stays float32.

    Float32 stay:

    - what comes of positions and constants alone: rotary frequencies, angles, their cosines and sines. They are rounded
      where they meet activations, once for all layers, as transformers does it;
    - the running column sums, and the calibration;
    - the logits, and the scale or cap that is applied to them: one Cast follows the product with the vocabulary.
      transformers scales and caps in the half type;
    - the choice of experts, from the product with the router's weights on: rounding it chooses others.

    Norms and attention compute in float32 inside their operator. No layer gets a Cast, but for two around a choice of
    experts. Weights are rounded when they are written, one at a time; one too large for the type raises
    `ActExportError` then.
    """

    def __init__(self, dtype: ir.DataType) -> None:
        """Takes FLOAT16 or BFLOAT16."""
        super().__init__()
        self.dtype = dtype

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the main graph, which must be sorted.

        Raises:
            ActExportError: If a value has no type, or an operator has a graph of its own.
        """
        graph = model.graph
        _check(graph)
        plan = _plan(graph, self.dtype)
        casts = _Casts(graph, self.dtype)
        constants: defaultdict[ir.Value, list[_Use]] = defaultdict(list)
        for node, target in plan.targets.items():
            for index, value in _free_inputs(node):
                if value.is_initializer() and value not in plan.storage:
                    constants[value].append(_Use(node, index, target))
                elif plan.storage[value] != target:
                    node.replace_input_with(index, casts.of(value, target))
            if node.op_type == "Cast" and node.outputs[0].dtype == _FLOAT:
                node.attributes["to"] = ir.AttrInt64("to", target)
        for value, uses in constants.items():
            _store_constant(graph, value, uses, self.dtype)
        for value, storage in plan.storage.items():
            if storage != _FLOAT:
                _store(value, storage)
        logits = _logits(graph)
        if logits.dtype != _FLOAT:
            whole = casts.of(logits, _FLOAT)
            logits.name, whole.name = f"{_LOGITS}_{_name(self.dtype)}", _LOGITS
            graph.outputs[graph.outputs.index(logits)] = whole
        return ir.passes.PassResult(model, modified=True)


@dataclass(frozen=True)
class _Use:
    node: ir.Node
    index: int
    target: ir.DataType


@dataclass(frozen=True)
class _Plan:
    """How float values are stored, and which type nodes compute in. Initializers are stored as their readers want."""

    storage: dict[ir.Value, ir.DataType] = field(default_factory=dict)
    targets: dict[ir.Node, ir.DataType] = field(default_factory=dict)


class _Casts:
    """Conversions of values, one Cast each."""

    def __init__(self, graph: ir.Graph, dtype: ir.DataType) -> None:
        self._graph = graph
        self._dtype = dtype
        self._made: dict[ir.Value, ir.Value] = {}

    def of(self, value: ir.Value, target: ir.DataType) -> ir.Value:
        """The value in the other type, which must be `target`: a value is stored in one of two."""
        if value not in self._made:
            node = ir.node("Cast", [value], {"to": target})
            cast, producer = node.outputs[0], value.producer()
            cast.name, cast.type, cast.shape = f"{value.name}_{_name(target)}", ir.TensorType(target), value.shape
            if producer is None:
                self._graph.insert_before(self._graph[0], node)
            else:
                self._graph.insert_after(producer, node)
            self._made[value] = cast
        return self._made[value]


def _check(graph: ir.Graph) -> None:
    for node in graph:
        if any(attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in _attributes(node)):
            raise ActExportError(
                f"the graph has an operator {node.op_type} with a graph inside, which can't be stored in a half type; "
                f"export it as float32"
            )
        untyped = [value for value in node.outputs if value.dtype is None and (value.uses() or value.is_graph_output())]
        if untyped:
            raise ActExportError(
                f"the type of {untyped[0].name}, a result of {node.op_type}, isn't known, so it can't be stored in a "
                f"half type; export it as float32"
            )


def _attributes(node: ir.Node) -> Sequence[ir.Attr]:
    return [attribute for attribute in node.attributes.values() if isinstance(attribute, ir.Attr)]


def _plan(graph: ir.Graph, dtype: ir.DataType) -> _Plan:
    plan = _Plan()
    for value in graph.inputs:
        if value.dtype == _FLOAT:
            plan.storage[value] = _FLOAT if _SINK_SCORES in str(value.name) else dtype
    whole = _scaling_of_logits(_logits(graph)) | routing_nodes(graph)
    computed_constants = _computed_constants(graph)
    for node in graph:
        if node not in computed_constants:
            _decide(plan, node, _FLOAT if node in whole else _type_by_inputs(node, plan, dtype))
    for node in reversed(computed_constants):
        readers = {plan.targets[user] for output in node.outputs for user, _ in output.uses()}
        _decide(plan, node, _FLOAT if readers == {_FLOAT} or node.op_type in _OF_ATTRIBUTES else dtype)
    return plan


def _decide(plan: _Plan, node: ir.Node, target: ir.DataType) -> None:
    plan.targets[node] = target
    for index, value in enumerate(node.outputs):
        if value.dtype == _FLOAT:
            plan.storage[value] = _FLOAT if index in _float32_slots(node, outputs=True) else target


def _computed_constants(graph: ir.Graph) -> list[ir.Node]:
    """Nodes that read constants alone, in order."""
    found: dict[ir.Node, None] = {}
    for node in graph:
        if all(value is None or _is_constant(value) or value.producer() in found for value in node.inputs):
            found[node] = None
    return list(found)


def _is_constant(value: ir.Value) -> bool:
    return value.is_initializer() and not value.is_graph_input()


def _type_by_inputs(node: ir.Node, plan: _Plan, dtype: ir.DataType) -> ir.DataType:
    """Half if it reads activations or looks up a table of weights; float32 if it reads positions."""
    stored = {plan.storage[value] for _, value in _free_inputs(node) if value in plan.storage}
    if stored:
        return dtype if dtype in stored else _FLOAT
    return dtype if node.op_type == "Gather" else _FLOAT


def _scaling_of_logits(logits: ir.Value) -> set[ir.Node]:
    """The operators that make logits of logits by single numbers, such as a cap: the last ones of the graph."""
    found: set[ir.Node] = set()
    value = logits
    while (node := value.producer()) is not None and node.op_type in _SCALING and node.domain == "":
        varying = [given for given in node.inputs if given is not None and not _is_single_number(given)]
        if len(varying) != 1 or len(varying[0].uses()) != 1:
            break
        found.add(node)
        value = varying[0]
    return found


def _is_single_number(value: ir.Value) -> bool:
    return _is_constant(value) and value.const_value is not None and value.const_value.size == 1


def _logits(graph: ir.Graph) -> ir.Value:
    return next(value for value in graph.outputs if value.name == _LOGITS)


def _free_inputs(node: ir.Node) -> Iterator[tuple[int, ir.Value]]:
    """Float inputs that can be stored in either type."""
    fixed = _float32_slots(node, outputs=False)
    for index, value in enumerate(node.inputs):
        if value is not None and value.dtype == _FLOAT and index not in fixed:
            yield index, value


def _float32_slots(node: ir.Node, *, outputs: bool) -> set[int]:
    if node.domain != schema.DOMAIN:
        return set()
    described = schema.schema(node.op_type)
    parameters = described.outputs if outputs else described.inputs
    return {index for index, parameter in enumerate(parameters) if parameter.type_str == "F"}


def _store_constant(graph: ir.Graph, value: ir.Value, uses: Sequence[_Use], dtype: ir.DataType) -> None:
    """Rounds a constant; where some readers want it whole, those of the half type get a copy."""
    rounded = [use for use in uses if use.target == dtype]
    if len(rounded) == len(uses):
        _store(value, dtype)
    elif rounded:
        copy = ir.Value(
            name=f"{value.name}.{_name(dtype)}", shape=value.shape, type=value.type, const_value=value.const_value
        )
        _store(copy, dtype)
        graph.register_initializer(copy)
        for use in rounded:
            use.node.replace_input_with(use.index, copy)


def _store(value: ir.Value, dtype: ir.DataType) -> None:
    value.type = ir.TensorType(dtype)  # a new one: values may share theirs
    if value.const_value is not None:
        value.const_value = _rounded(value.const_value, str(value.name), dtype)


def _rounded(tensor: ir.TensorProtocol, name: str, dtype: ir.DataType) -> ir.TensorProtocol:
    def rounded() -> ir.TensorProtocol:
        values = tensor.numpy()
        _check_range(values, name, dtype)
        return ir.Tensor(values.astype(dtype.numpy()), dtype=dtype, name=name)

    return ir.LazyTensor(rounded, dtype=dtype, shape=ir.Shape(tensor.shape.numpy()), name=name)


def _check_range(values: np.ndarray, name: str, dtype: ir.DataType) -> None:
    if not values.size:
        return
    most = _LARGEST[dtype]
    extreme = max(float(values.max()), float(values.min()), key=abs)  # no copy of all magnitudes
    if np.isinf(extreme) and values.ndim == 1:  # of a token that a bias rules out: every type has infinities
        extreme = float(np.abs(values[np.isfinite(values)]).max(initial=0))
    if abs(extreme) > most:
        advice = "--dtype bfloat16" if dtype == ir.DataType.FLOAT16 else "--dtype float32"
        raise ActExportError(
            f"{name} has the value {extreme:g}; {_name(dtype)} goes up to {most:g}, so it can't store this model: "
            f"export it with {advice}"
        )


def _name(dtype: ir.DataType) -> str:
    return dtype.name.lower() if dtype != _FLOAT else "float32"


_PRODUCTS = {"Gemm", "MatMul"}
_NORMS = {"LayerNormalization", "RMSNormalization"}


def routing_nodes(graph: ir.Graph) -> set[ir.Node]:
    """The nodes that make the scores by which each token's experts are chosen.

    From each TopK of floats back to the product with the router's weights, which is one of them. A rounding of these
    scores can choose another expert, and the product is small.
    """
    found: set[ir.Node] = set()
    pending = [node for node in graph if _chooses(node)]
    while pending:
        for value in pending.pop().inputs:
            node = value.producer() if value is not None and value.dtype == ir.DataType.FLOAT else None
            if node is None or node in found or node.domain != "" or node.op_type in _NORMS:
                continue
            found.add(node)
            if node.op_type not in _PRODUCTS:
                pending.append(node)
    return found


def _chooses(node: ir.Node) -> bool:
    scores = node.inputs[0] if node.op_type == "TopK" and node.domain == "" else None
    return scores is not None and scores.dtype == ir.DataType.FLOAT
