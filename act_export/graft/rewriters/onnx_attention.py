"""ONNX's own `Attention`, of opset 23 and 24, as torch's exporter and others write it.

Query, key and value have heads side by side or apart. The node may hold the cache, or the graph joins it before the
node, and may repeat its heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import onnx

from act_export.graft.graph import Graph, UnsupportedPatternError, attribute, describe
from act_export.graft.operator_mask import MaskReader, OperatorMask
from act_export.graft.site import AttentionTerms, CacheNames, Layout, OperandSite, layer_of
from act_export.graft.surroundings import check_cache, flat_output, head_repeats, joined_cache, new_tokens, unused_nodes

_INPUTS = ("query", "key", "value", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")
_KNOWN = {
    "is_causal",
    "q_num_heads",
    "kv_num_heads",
    "scale",
    "softcap",
    "softmax_precision",  # the operator's is float32 for every type
    "qk_matmul_output_mode",
}
_NEUTRAL: dict[str, Any] = {"left_window_size": -1, "right_window_size": -1}
_RANKS = {3: Layout.FLAT, 4: Layout.HEADS}
_OUTPUTS = 3


def find(graph: Graph) -> Iterator[OperandSite]:
    """The Attention nodes of a graph, in its order."""
    masks = MaskReader(graph)
    for node in graph.proto.node:
        if node.op_type == "Attention" and node.domain == "":
            yield _site(graph, masks, node)


def _site(graph: Graph, masks: MaskReader, node: onnx.NodeProto) -> OperandSite:
    inputs = dict(zip(_INPUTS, [*node.input, *[""] * len(_INPUTS)], strict=False))
    outputs = [*node.output, "", ""]
    own = CacheNames(inputs["past_key"], inputs["past_value"], outputs[1], outputs[2])
    joined = None if own.past_key else joined_cache(graph, inputs["key"], inputs["value"])
    cache, layout = joined or own, _layout(graph, node)
    layer = layer_of(cache.past_key)
    output, output_layout = (node.output[0], layout) if layout is Layout.FLAT else flat_output(graph, node.output[0])
    found = OperandSite(
        layer=-1 if layer is None else layer,
        nodes=(node,),
        terms=None,
        cache=cache,
        output=output,
        output_layout=output_layout,
        query=inputs["query"],
        key=inputs["key"] if joined is None else new_tokens(graph, cache.present_key),
        value=inputs["value"] if joined is None else new_tokens(graph, cache.present_value),
        query_layout=layout,
        key_layout=layout if joined is None else Layout.HEADS,
    )
    try:
        _check(graph, node, inputs, cache)
        mask = OperatorMask(
            added=inputs["attn_mask"], causal=bool(attribute(node, "is_causal", 0)), own_cache=joined is None
        )
        read = masks.read(mask)
        return replace(
            found,
            nodes=unused_nodes(
                graph, (output, cache.present_key, cache.present_value), (found.query, found.key, found.value)
            ),
            terms=replace(_terms(graph, node, found, joined is not None), sliding_window=read.sliding_window),
            takes_chunks=read.takes_chunks,
            embeddings=masks.embeddings(mask),
        )
    except UnsupportedPatternError as error:
        return replace(found, terms=None, problem=f"{describe(node)}: {error}")


def _layout(graph: Graph, node: onnx.NodeProto) -> Layout:
    """By the query's shape; where the graph doesn't say it, by an attribute that goes with heads side by side."""
    shape = graph.shape(node.input[0])
    if shape is not None and len(shape) in _RANKS:
        return _RANKS[len(shape)]
    return Layout.HEADS if attribute(node, "q_num_heads") is None else Layout.FLAT


def _check(graph: Graph, node: onnx.NodeProto, inputs: Mapping[str, str], cache: CacheNames) -> None:
    """Refuses what the operator can't do, whatever the numbers are."""
    if inputs["nonpad_kv_seqlen"]:
        raise UnsupportedPatternError("it counts keys by nonpad_kv_seqlen, in a cache that act-export doesn't know")
    for given in node.attribute:
        value = attribute(node, given.name)
        if given.name in _NEUTRAL and value != _NEUTRAL[given.name]:
            raise UnsupportedPatternError(f"it has {given.name} = {value!r}, which act-export doesn't know")
        if given.name not in _NEUTRAL and given.name not in _KNOWN:
            raise UnsupportedPatternError(
                f"it has an attribute {given.name!r} that this version of act-export doesn't know"
            )
    if len(node.output) > _OUTPUTS and node.output[_OUTPUTS]:
        raise UnsupportedPatternError("its logits are an output (qk_matmul_output), which the operator doesn't make")
    check_cache(graph, cache)
    sizes = [(graph.shape(name) or [None])[-1] for name in (cache.past_key, cache.past_value)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise UnsupportedPatternError(f"its keys have size {sizes[0]} and its values {sizes[1]}; one size is known")


def _terms(graph: Graph, node: onnx.NodeProto, found: OperandSite, joined: bool) -> AttentionTerms:
    cache = found.cache
    heads = _number(graph, node, "q_num_heads", found.query)
    kv_heads = _dimension(graph, 1, cache.past_key, found.key if found.key_layout is Layout.HEADS else "")
    kv_heads = kv_heads or attribute(node, "kv_num_heads")
    size = _dimension(graph, 3, cache.past_key, found.key if found.key_layout is Layout.HEADS else "")
    if heads is None or kv_heads is None:
        raise UnsupportedPatternError("the graph doesn't say how many heads it has")
    if joined:
        if size is None:
            raise UnsupportedPatternError(f"the graph doesn't say the size of a head of {cache.past_key}")
        for used, present in ((node.input[1], cache.present_key), (node.input[2], cache.present_value)):
            repeats = head_repeats(graph, used, found.query_layout, present, kv_heads, size)
            if attribute(node, "kv_num_heads", repeats * kv_heads) != repeats * kv_heads:
                raise UnsupportedPatternError(f"{used} doesn't have the heads that kv_num_heads says")
    scale = attribute(node, "scale")
    if scale is None and size is None:
        raise UnsupportedPatternError("it has no scale, and the graph doesn't say its head size")
    return AttentionTerms(
        num_heads=heads,
        kv_num_heads=kv_heads,
        head_size=size,
        scale=(size or 1) ** -0.5 if scale is None else scale,
        softcap=attribute(node, "softcap", 0.0),
    )


def _number(graph: Graph, node: onnx.NodeProto, name: str, value: str) -> int | None:
    """Heads of a value, by an attribute or the value's shape."""
    given: int | None = attribute(node, name)
    return given or _dimension(graph, 1, value)


def _dimension(graph: Graph, axis: int, *values: str) -> int | None:
    """The first number that the graph says of an axis of (batch, heads, tokens, head size)."""
    for value in values:
        shape = graph.shape(value)
        if shape is not None and len(shape) == max(_RANKS) and shape[axis] is not None:
            return shape[axis]
    return None
