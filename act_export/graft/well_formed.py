"""Whether the nodes that a graft reads are as ONNX has them: their inputs, outputs and attributes.

What reads a graph takes attributes by name and inputs by number. A file may hold anything in their places, so this is
looked at once, before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import onnx
from onnx import AttributeProto

from act_export.errors import ActExportError, shown
from act_export.graft.graph import describe

_LEAST_INPUTS: Mapping[str, int] = {
    "Attention": 3,
    "CalibratedAttention": 8,
    "Cast": 1,
    "Concat": 1,
    "Div": 2,
    "Gather": 2,
    "GroupQueryAttention": 1,
    "MatMul": 2,
    "Mul": 2,
    "MultiHeadAttention": 1,
    "Reshape": 2,
    "Softmax": 1,
    "Transpose": 1,
}
_READ = {*_LEAST_INPUTS, "Gemm", "MatMulNBits", "RotaryEmbedding"}
_INT, _FLOAT, _INTS, _FLOATS = AttributeProto.INT, AttributeProto.FLOAT, AttributeProto.INTS, AttributeProto.FLOATS
_POSITIVE = {"num_heads", "kv_num_heads", "q_num_heads", "N", "K", "bits"}
_TYPES: Mapping[str, int] = {
    **dict.fromkeys((*_POSITIVE, "axis", "do_rotary", "is_causal", "local_window_size", "rotary_interleaved"), _INT),
    **dict.fromkeys(("sliding_window", "transA", "transB", "unidirectional", "smooth_softmax", "to"), _INT),
    **dict.fromkeys(("k_norm_epsilon", "mask_filter_value", "q_norm_epsilon", "qk_norm_epsilon", "scale"), _FLOAT),
    **dict.fromkeys(("softcap",), _FLOAT),
    **dict.fromkeys(("calibrated_heads", "perm"), _INTS),
    "sink_logits": _FLOATS,
}
_MOST_HEADS = 100_000
_LARGEST = 2**31


def check_nodes(graph: onnx.GraphProto, file: str) -> None:
    """Refuses a graph with a node that ONNX doesn't know so, as far as a graft reads it.

    Args:
        graph: Of the model.
        file: Named in errors.

    Raises:
        ActExportError: Naming the node, and the attribute with its value.
    """
    for node in graph.node:
        if not node.output:
            raise ActExportError(f"{file} is damaged: {describe(node)} has no outputs; export it again")
        if len(node.input) < _LEAST_INPUTS.get(node.op_type, 0):
            raise ActExportError(
                f"{file} is damaged: {describe(node)} has {len(node.input)} inputs of at least "
                f"{_LEAST_INPUTS[node.op_type]}; export it again"
            )
        if node.op_type in _READ:
            for given in node.attribute:
                _check_attribute(node, given, file)


def _values(given: AttributeProto) -> list[tuple[int, Sequence[float]]]:
    return [(_INT, [given.i]), (_FLOAT, [given.f]), (_INTS, given.ints), (_FLOATS, given.floats)]


def _check_attribute(node: onnx.NodeProto, given: AttributeProto, file: str) -> None:
    wanted = _TYPES.get(given.name)
    if wanted is None:
        return
    values = next(found for kind, found in _values(given) if kind == wanted)
    lowest = 1 if given.name in _POSITIVE else -_LARGEST
    highest = _MOST_HEADS if given.name.endswith("num_heads") else _LARGEST
    whole = wanted in (_INT, _INTS)
    fits = all(lowest <= value <= highest if whole else math.isfinite(value) for value in values)
    if given.type != wanted or not fits:
        kind = AttributeProto.AttributeType.Name(wanted).lower()
        raise ActExportError(
            f"{file} is damaged: {describe(node)} has {given.name} = {shown(list(values))}; it must be of type {kind}"
            + (f", from {lowest} to {highest}" if whole else "")
            + "; export it again"
        )
