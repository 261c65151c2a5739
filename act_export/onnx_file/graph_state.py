"""Heads and sizes of a model's cache, read off its graph where the shapes of its inputs don't say them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from act_export.errors import SessionError, shown
from act_export.json_file import read_object
from act_export.onnx_file.load import load_without_weights
from act_export.onnx_file.names import GENAI_CONFIG, PAST, PRESENT
from act_export.onnx_file.state import BFLOAT16, StateInput
from act_export.ops import schema

_MOST = 2**31
GROUP_QUERY_ATTENTION = "GroupQueryAttention"
_BETWEEN_PROJECTION_AND_ATTENTION = ("Reshape", "RotaryEmbedding", "SimplifiedLayerNormalization", "Split")
_STATE_DTYPES = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)


def state_of_file(file: Path, name: str) -> StateInput:
    """A part of the state of a model that isn't loaded, by its input's name; errors as of `state_input`."""
    graph = load_without_weights(file, SessionError).graph
    given = next(each for each in graph.input if each.name == name)
    return state_input(file, graph, given, configuration_beside(file))


def state_input(
    file: Path, graph: onnx.GraphProto, given: onnx.ValueInfoProto, configuration: Mapping[str, int | None]
) -> StateInput:
    """A part of the state.

    Args:
        file: Named in errors.
        graph: Of the model.
        given: The graph's input.
        configuration: What `configuration_beside` found.

    Raises:
        SessionError: If it isn't a cache, or neither graph nor configuration say its heads or their size.
    """
    shape = declared_shape(given)
    if len(shape) != 4 or declared_dtype(given) not in _STATE_DTYPES:
        raise SessionError(
            f"{file}: {given.name} is {declared_dtype(given)} of rank {len(shape)}; it must be float32, float16 or "
            f"bfloat16, (batch, heads, past, head size)"
        )
    node = next((node for node in graph.node if given.name in node.input), None)
    if any(size is not None and not 0 < size < _MOST for size in (shape[1], shape[3])):
        raise SessionError(
            f"{file}: {given.name} has the shape {shape}; heads and head size must be positive: write the file again"
        )
    heads = shape[1] or _attribute(node, "kv_num_heads") or configuration.get("num_key_value_heads")
    size = shape[3] or configuration.get("head_size") or _head_size_of_weights(graph, node)
    if heads is None or size is None:
        what = "number of key-value heads" if heads is None else "head size"
        raise SessionError(
            f"can't tell the {what} of {file}: the shape of {given.name} doesn't say, its attention's weights neither, "
            f"and there is no genai_config.json or config.json beside it that does; put it there"
        )
    return StateInput(given.name, present_name(given), int(heads), int(size), declared_dtype(given))


def _head_size_of_weights(graph: onnx.GraphProto, attention: onnx.NodeProto | None) -> int | None:
    """Width of the key's projection, or of query, key and value packed, by the number of heads."""
    if attention is None or attention.op_type not in (GROUP_QUERY_ATTENTION, schema.CALIBRATED):
        return None
    heads = _attribute(attention, "num_heads")
    kv_heads = _attribute(attention, "kv_num_heads")
    producers = {name: node for node in graph.node for name in node.output}
    if len(attention.input) < 2:
        return None
    packed = not attention.input[1]
    projection = producers.get(attention.input[0 if packed else 1])
    for _ in range(len(graph.node)):  # a graph may go in a circle
        if projection is None or not projection.input or projection.op_type not in _BETWEEN_PROJECTION_AND_ATTENTION:
            break
        packed = packed or projection.op_type == "Split"
        projection = producers.get(projection.input[0])
    if projection is None or heads is None or kv_heads is None or _attribute(projection, "transB"):
        return None
    widths = [tensor.dims[-1] for tensor in graph.initializer if tensor.name in projection.input and tensor.dims]
    width = _attribute(projection, "N") or max(widths, default=None)  # N: of a quantized matrix product
    parts = heads + 2 * kv_heads if packed else kv_heads
    return width // parts if width is not None and width % parts == 0 else None


def configuration_beside(file: Path) -> dict[str, int | None]:
    """What genai_config.json, or else config.json, beside a model says of heads, context and vocabulary.

    None stands for what it doesn't say, or not with a positive number.

    Raises:
        SessionError: If it is there and isn't a JSON object.
    """
    place = next((file.parent / name for name in (GENAI_CONFIG, "config.json") if (file.parent / name).is_file()), None)
    if place is None:
        return {}
    found = read_object(place, error=SessionError, infinite=True, repeats=True)
    whole = found["model"] if isinstance(found.get("model"), dict) else found
    decoder = whole["decoder"] if isinstance(whole.get("decoder"), dict) else whole

    def number(fields: Mapping[str, Any], *names: str) -> int | None:
        found = [fields.get(name) for name in names]
        return next((each for each in found if type(each) is int and 0 < each < _MOST), None)

    size = number(decoder, "head_size", "head_dim")
    width, heads = number(decoder, "hidden_size"), number(decoder, "num_attention_heads")
    if size is None and width is not None and heads is not None:
        size = width // heads
    return {
        "head_size": size,
        "num_key_value_heads": number(decoder, "num_key_value_heads"),
        "vocab_size": number(whole, "vocab_size"),
        "context": number(whole, "context_length", "max_position_embeddings"),
    }


def present_name(state: onnx.ValueInfoProto) -> str:
    """The graph's output that is the next call's input."""
    return state.name.replace(PAST, PRESENT)


def declared_shape(value: onnx.ValueInfoProto) -> list[int | None]:
    """Dimensions; None for those without a number."""
    return [dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim] or [None]


def declared_dtype(value: onnx.ValueInfoProto) -> np.dtype[Any]:
    """numpy's type; an error where ONNX has none of that number."""
    kind = value.type.tensor_type.elem_type
    try:
        return np.dtype(helper.tensor_dtype_to_np_dtype(kind))
    except KeyError as error:
        raise SessionError(f"{shown(value.name)} has the type {kind}, which isn't one of ONNX's") from error


def _attribute(node: onnx.NodeProto | None, name: str) -> int | None:
    found = next((given for given in node.attribute if given.name == name), None) if node is not None else None
    return found.i if found is not None and 0 < found.i < _MOST else None
