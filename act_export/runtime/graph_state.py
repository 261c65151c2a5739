"""Heads and sizes of a model's cache, read off its graph where the shapes of its inputs don't say them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from act_export.errors import SessionError
from act_export.ops import schema
from act_export.runtime.state import BFLOAT16, StateInput

GROUP_QUERY_ATTENTION = "GroupQueryAttention"
_BETWEEN_PROJECTION_AND_ATTENTION = ("Reshape", "RotaryEmbedding", "SimplifiedLayerNormalization", "Split")
_STATE_DTYPES = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)


def state_of_file(file: Path, name: str) -> StateInput:
    """A part of the state of a model that isn't loaded, by its input's name; errors as of `state_input`."""
    graph = onnx.load(file, load_external_data=False).graph
    given = next(each for each in graph.input if each.name == name)
    return state_input(file, graph, given, configuration_beside(file))


def state_input(
    file: Path, graph: onnx.GraphProto, given: onnx.ValueInfoProto, configuration: Mapping[str, Any]
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
    packed = not attention.input[1]
    projection = producers.get(attention.input[0 if packed else 1])
    while projection is not None and projection.op_type in _BETWEEN_PROJECTION_AND_ATTENTION:
        packed = packed or projection.op_type == "Split"
        projection = producers.get(projection.input[0])
    if projection is None or heads is None or kv_heads is None or _attribute(projection, "transB"):
        return None
    widths = [tensor.dims[-1] for tensor in graph.initializer if tensor.name in projection.input and tensor.dims]
    width = _attribute(projection, "N") or max(widths, default=None)  # N: of a quantized matrix product
    parts = heads + 2 * kv_heads if packed else kv_heads
    return width // parts if width is not None and width % parts == 0 else None


def configuration_beside(file: Path) -> dict[str, Any]:
    """What genai_config.json, or else config.json, beside a model says of heads, context and vocabulary."""
    for name in ("genai_config.json", "config.json"):
        try:
            found = json.loads((file.parent / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        whole = found.get("model", found)
        decoder = whole.get("decoder", whole)
        size = decoder.get("head_size") or decoder.get("head_dim")
        if size is None and {"hidden_size", "num_attention_heads"} <= decoder.keys():
            size = decoder["hidden_size"] // decoder["num_attention_heads"]
        return {
            "head_size": size,
            "num_key_value_heads": decoder.get("num_key_value_heads"),
            "vocab_size": whole.get("vocab_size"),
            "context": whole.get("context_length") or whole.get("max_position_embeddings"),
        }
    return {}


def present_name(state: onnx.ValueInfoProto) -> str:
    """The graph's output that is the next call's input."""
    return state.name.replace("past_key_values.", "present.")


def declared_shape(value: onnx.ValueInfoProto) -> list[int | None]:
    """Dimensions; None for those without a number."""
    return [dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim] or [None]


def declared_dtype(value: onnx.ValueInfoProto) -> np.dtype[Any]:
    """numpy's type."""
    return np.dtype(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))


def _attribute(node: onnx.NodeProto | None, name: str) -> int | None:
    found = next((given for given in node.attribute if given.name == name), None) if node is not None else None
    return found.i if found is not None else None
