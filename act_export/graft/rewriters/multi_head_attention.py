"""`com.microsoft.MultiHeadAttention`, as onnxruntime-genai's builder and ONNX Runtime's optimizer write it.

The node may hold the cache, with as many heads as the query; or the graph joins the cache before it and repeats its
heads. A bias of query, key and value may be part of the node; it becomes nodes of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import onnx

from act_export.graft.graph import Graph, UnsupportedPatternError, attribute, describe
from act_export.graft.operator_mask import MaskReader, OperatorMask
from act_export.graft.site import AttentionTerms, CacheNames, Layout, OperandSite, layer_of
from act_export.graft.surroundings import check_cache, head_repeats, joined_cache, new_tokens, unused_nodes
from act_export.onnx_file.node_builder import NodeBuilder
from act_export.onnx_file.precision import MICROSOFT

_INPUTS = (
    "query",
    "key",
    "value",
    "bias",
    "key_padding_mask",
    "attention_bias",
    "past_key",
    "past_value",
    "past_sequence_length",
    "cache_indirection",
)
_UNSUPPORTED_INPUTS = {
    "past_sequence_length": "a cache in a buffer of fixed length",
    "cache_indirection": "beams in its cache",
}
_KNOWN = {"num_heads", "scale", "unidirectional", "mask_filter_value"}
_LOWEST = -10000.0
_QUERY_RANK = 3
_CACHE_RANK = 4
_OUTPUTS = 3


@dataclass(frozen=True)
class MultiHeadAttentionSite(OperandSite):
    """One MultiHeadAttention node; see `OperandSite`.

    Attributes:
        bias: Added to query, key and value, (3 * hidden size,), one behind the other; empty for none.
        hidden_size: Of each.
    """

    bias: str = ""
    hidden_size: int = 0

    def operands(self, build: NodeBuilder) -> tuple[str, str, str]:
        """See `AttentionSite`."""
        plain = super().operands(build)
        if not self.bias:
            return plain
        names = ("query", "key", "value")
        sizes = build.constant([self.hidden_size] * 3, "bias_sizes")
        biases = build.add_many("Split", [self.bias, sizes], "bias", [build.prefix + f"{name}_bias" for name in names])
        query, key, value = (
            build.add("Add", [each, bias], f"{name}_biased")
            for each, bias, name in zip(plain, biases, names, strict=True)
        )
        return query, key, value


def find(graph: Graph) -> Iterator[MultiHeadAttentionSite]:
    """The MultiHeadAttention nodes of a graph, in its order."""
    masks = MaskReader(graph)
    for node in graph.proto.node:
        if node.op_type == "MultiHeadAttention" and node.domain == MICROSOFT:
            yield _site(graph, masks, node)


def _site(graph: Graph, masks: MaskReader, node: onnx.NodeProto) -> MultiHeadAttentionSite:
    inputs = dict(zip(_INPUTS, [*node.input, *[""] * len(_INPUTS)], strict=False))
    outputs = [*node.output, "", ""]
    own = CacheNames(inputs["past_key"], inputs["past_value"], outputs[1], outputs[2])
    joined = None if own.past_key else joined_cache(graph, inputs["key"], inputs["value"])
    cache = joined or own
    layer = layer_of(cache.past_key)
    found = MultiHeadAttentionSite(
        layer=-1 if layer is None else layer,
        nodes=(node,),
        terms=None,
        cache=cache,
        output=node.output[0],
        query=inputs["query"],
        key=inputs["key"],
        value=inputs["value"],
    )
    try:
        _check(graph, node, inputs, cache)
        found = _with_joined_cache(graph, node, found) if joined else _with_own_cache(graph, node, found)
        mask = OperatorMask(
            added=inputs["attention_bias"],
            keys=inputs["key_padding_mask"],
            causal=bool(attribute(node, "unidirectional", 0)),
            own_cache=joined is None,
            lowest=attribute(node, "mask_filter_value", _LOWEST),
        )
        assert found.terms is not None
        read = masks.read(mask)
        terms = replace(found.terms, sliding_window=read.sliding_window)
        found = replace(found, terms=terms, takes_chunks=read.takes_chunks, embeddings=masks.embeddings(mask))
        return _with_bias(graph, found, inputs["bias"], joined is not None) if inputs["bias"] else found
    except UnsupportedPatternError as error:
        return replace(found, terms=None, problem=f"{describe(node)}: {error}")


def _check(graph: Graph, node: onnx.NodeProto, inputs: Mapping[str, str], cache: CacheNames) -> None:
    """Refuses what the operator can't do, whatever the numbers are."""
    for name, what in _UNSUPPORTED_INPUTS.items():
        if inputs[name]:
            raise UnsupportedPatternError(f"it has {what} (its input {name}), which act-export doesn't take apart")
    for given in node.attribute:
        if given.name not in _KNOWN:
            raise UnsupportedPatternError(
                f"it has an attribute {given.name!r} that this version of act-export doesn't know"
            )
    if len(node.output) > _OUTPUTS and node.output[_OUTPUTS]:
        raise UnsupportedPatternError("its attention map is an output, which the operator doesn't make")
    check_cache(graph, cache)
    ranks = {name: graph.shape(inputs[name]) for name in ("query", "key", "value") if inputs[name]}
    packed = any(shape is not None and len(shape) != _QUERY_RANK for shape in ranks.values())
    if packed or not inputs["key"] or not inputs["value"]:
        raise UnsupportedPatternError(
            "its query, key and value aren't three inputs of (batch, sequence, heads * head size)"
        )


def _with_own_cache(graph: Graph, node: onnx.NodeProto, found: MultiHeadAttentionSite) -> MultiHeadAttentionSite:
    heads = attribute(node, "num_heads")
    shape = graph.shape(found.cache.past_key)
    size = shape[-1] if shape is not None and len(shape) == _CACHE_RANK else None
    width = graph.shape(found.query)
    if size is None and width is not None and width[-1] is not None:
        size = width[-1] // heads
    return replace(found, terms=_terms(node, heads, size))


def _with_joined_cache(graph: Graph, node: onnx.NodeProto, found: MultiHeadAttentionSite) -> MultiHeadAttentionSite:
    """Of a cache that the graph joins before the node, whose heads it may repeat."""
    heads, cache = attribute(node, "num_heads"), found.cache
    key, value = new_tokens(graph, cache.present_key), new_tokens(graph, cache.present_value)
    shapes = [graph.shape(name) or [None] * _CACHE_RANK for name in (cache.past_key, key)]
    kv_heads, size = (shapes[0][axis] or shapes[1][axis] for axis in (1, 3))
    if kv_heads is None or size is None:
        raise UnsupportedPatternError(f"the graph doesn't say the heads of {cache.past_key} and their size")
    for used, present in ((found.key, cache.present_key), (found.value, cache.present_value)):
        repeats = head_repeats(graph, used, Layout.FLAT, present, kv_heads, size)
        if repeats * kv_heads != heads:
            raise UnsupportedPatternError(f"it has {heads} heads, and {used} has {repeats * kv_heads}")
    return replace(
        found,
        nodes=unused_nodes(graph, (found.output, cache.present_key, cache.present_value), (found.query, key, value)),
        terms=replace(_terms(node, heads, size), kv_num_heads=kv_heads),
        key=key,
        value=value,
        key_layout=Layout.HEADS,
    )


def _with_bias(graph: Graph, found: MultiHeadAttentionSite, bias: str, joined: bool) -> MultiHeadAttentionSite:
    shape: Any = graph.shape(bias)
    if joined:
        raise UnsupportedPatternError(f"it adds the bias {bias} to keys that were in the cache")
    if shape is None or len(shape) != 1 or shape[0] is None or shape[0] % 3:
        raise UnsupportedPatternError(f"its bias {bias} has the shape {shape}; (3 * hidden size,) is known")
    return replace(found, bias=bias, hidden_size=shape[0] // 3)


def _terms(node: onnx.NodeProto, heads: int, head_size: int | None) -> AttentionTerms:
    scale = attribute(node, "scale", 0.0)
    if not scale and head_size is None:
        raise UnsupportedPatternError("it has no scale, and the graph doesn't say its head size")
    return AttentionTerms(heads, heads, head_size, scale or (head_size or 1) ** -0.5)
