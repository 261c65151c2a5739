"""What lies around an attention in a graph: the cache joined before it, heads put side by side after it.

Exporters that have an operator of attention without a cache, or with fewer query than key heads, leave these to nodes
of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx
from onnx import helper

from act_export.graft.graph import Graph, UnsupportedPatternError, attribute, describe
from act_export.graft.probe import Call, Part
from act_export.graft.site import CacheNames, Layout, is_cache_input

_RANK = 4
_TOKENS_AXIS = (2, -2)
_MOVES = ("Cast", "Expand", "Identity", "Reshape", "Squeeze", "Tile", "Transpose", "Unsqueeze")
_CALL = Call(np.ones((2, 5), np.int64), 3)


def joined_cache(graph: Graph, key: str, value: str) -> CacheNames | None:
    """The cache, where an attention gets keys and values that were joined to it; None if they weren't.

    Args:
        graph: The graph.
        key: As the attention gets it.
        value: As the attention gets it.
    """
    keys, values = (_join(graph, name) for name in (key, value))
    if keys is None or values is None:
        return None
    return CacheNames(keys.input[0], values.input[0], keys.output[0], values.output[0])


def check_cache(graph: Graph, cache: CacheNames) -> None:
    """Raises UnsupportedPatternError unless an attention has a cache, and its past is among the model's inputs."""
    if not all((cache.past_key, cache.past_value, cache.present_key, cache.present_value)):
        raise UnsupportedPatternError("it has no cache; export the model with past_key_values")
    if not is_cache_input(graph, cache.past_key) or not is_cache_input(graph, cache.past_value):
        raise UnsupportedPatternError(f"{cache.past_key} and {cache.past_value} aren't inputs of the model")


def new_tokens(graph: Graph, present: str) -> str:
    """What was joined to the cache, (batch, key-value heads, sequence, head size)."""
    node = graph.producer(present)
    assert node is not None
    name: str = node.input[1]
    return name


def head_repeats(graph: Graph, used: str, layout: Layout, present: str, heads: int, head_size: int) -> int:
    """How often an attention uses each head of a cache.

    Args:
        graph: The graph.
        used: What the attention gets.
        layout: Of this.
        present: The cache with the new tokens, (batch, key-value heads, tokens, head size).
        heads: Of the cache.
        head_size: Of each.

    Raises:
        UnsupportedPatternError: If something else happens between the two.
    """
    kind = graph.element_type(used) or graph.element_type(present)
    dtype = helper.tensor_dtype_to_np_dtype(kind or onnx.TensorProto.FLOAT)
    total = _CALL.mask.shape[1]
    random = np.random.default_rng(0)
    given = random.standard_normal((_CALL.batch, heads, total, head_size)).astype(dtype)
    got = Part(graph, used, [present]).run({present: given}, _CALL)
    if layout is Layout.FLAT and got.ndim == _RANK - 1 and got.shape[2] % head_size == 0:
        got = got.reshape(*got.shape[:2], -1, head_size).swapaxes(1, 2)
    repeats = got.shape[1] // heads if got.ndim == _RANK else 0
    if not repeats or not np.array_equal(got, np.repeat(given, repeats, axis=1)):
        raise UnsupportedPatternError(f"{used} isn't {present} with its heads repeated")
    return repeats


def flat_output(graph: Graph, output: str) -> tuple[str, Layout]:
    """What the rest of a graph goes on with: heads side by side, where nodes put (batch, heads, ...) so."""
    rows = _only_consumer(graph, output, "Transpose")
    if rows is not None and attribute(rows, "perm") == [0, 2, 1, 3]:
        flat = _only_consumer(graph, rows.output[0], "Reshape")
        if flat is not None and _has_three_axes(graph, flat):
            return flat.output[0], Layout.FLAT
    return output, Layout.HEADS


def unused_nodes(graph: Graph, ends: Iterable[str], starts: Sequence[str]) -> tuple[onnx.NodeProto, ...]:
    """The nodes that nothing needs any more once values are computed in another way.

    Args:
        graph: The graph.
        ends: The values.
        starts: What they are computed from in both ways.

    Raises:
        UnsupportedPatternError: If a node reads one of the values before all of them can be there.
    """
    made = set(ends)
    nodes, _ = graph.between(list(made), starts)
    unused: set[int] = set()
    for node in reversed(nodes):
        if all(name in made or _is_unused(graph, name, unused) for name in node.output if name):
            unused.add(graph.position(node))
    last = max(unused)
    for name in made:
        for reader in graph.consumers(name):
            if graph.position(reader) < last and graph.position(reader) not in unused:
                raise UnsupportedPatternError(f"{describe(reader)} reads {name} before the attention is done")
    return tuple(graph.proto.node[position] for position in sorted(unused))


def _join(graph: Graph, value: str) -> onnx.NodeProto | None:
    """The node that puts new keys behind those of the cache."""
    node = graph.producer(value)
    while node is not None and node.op_type in _MOVES:
        node = graph.producer(node.input[0])
    if node is None or node.op_type != "Concat" or len(node.input) != 2 or not is_cache_input(graph, node.input[0]):
        return None
    return node if attribute(node, "axis") in _TOKENS_AXIS and node.output[0] in graph.outputs else None


def _only_consumer(graph: Graph, value: str, operator: str) -> onnx.NodeProto | None:
    """The node of a type that goes on with a value, if nothing but shapes is read off it otherwise."""
    others = [node for node in graph.consumers(value) if node.op_type != "Shape"]
    return others[0] if len(others) == 1 and others[0].op_type == operator and value not in graph.outputs else None


def _has_three_axes(graph: Graph, reshape: onnx.NodeProto) -> bool:
    constant = graph.constant(reshape.input[1])
    if constant is not None:
        return constant.size == _RANK - 1
    shape = graph.shape(reshape.output[0])
    if shape is not None:
        return len(shape) == _RANK - 1
    node = graph.producer(reshape.input[1])
    return node is not None and node.op_type == "Concat" and len(node.input) == _RANK - 1


def _is_unused(graph: Graph, value: str, unused: set[int]) -> bool:
    return value not in graph.outputs and all(graph.position(each) in unused for each in graph.consumers(value))
