"""`com.microsoft.GroupQueryAttention`, as onnxruntime-genai's builder and Olive write it.

Query, key and value are separate or packed into one tensor. RMS norms of query and key and the rotary embedding may be
part of the node; they become nodes of their own. Its keys lie in the cache without padding between them; the operator
keeps them where the mask has them, which is the same for real tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from act_export.graft.graph import Graph, attribute, describe
from act_export.graft.site import AttentionSite, AttentionTerms, CacheNames, Dimension, layer_of
from act_export.onnx_file.node_builder import POSITIONS, NodeBuilder
from act_export.onnx_file.precision import MICROSOFT

_INPUTS = (
    "query",
    "key",
    "value",
    "past_key",
    "past_value",
    "seqlens_k",
    "total_sequence_length",
    "cos_cache",
    "sin_cache",
    "position_ids",
    "attention_bias",
    "head_sink",
    "k_scale",
    "v_scale",
    "q_norm_weight",
    "k_norm_weight",
    "query_seqlens",
)
_UNSUPPORTED_INPUTS = {
    "attention_bias": "a bias of the logits",
    "head_sink": "learned sinks",
    "k_scale": "a quantised cache",
    "v_scale": "a quantised cache",
    "query_seqlens": "sequences of different lengths in one call",
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "causal": (1,),
    "kv_cache_bit_width": (0,),
    "k_quant_type": ("", "NONE"),
    "v_quant_type": ("", "NONE"),
    "qk_output": (0,),
    "smooth_softmax": (-1, 0),
}
_KNOWN = {
    "num_heads",
    "kv_num_heads",
    "scale",
    "softcap",
    "local_window_size",
    "do_rotary",
    "rotary_interleaved",
    "sliding_window_cache",  # how its cache is kept short; the operator's is whole
    "qk_norm_epsilon",
    "q_norm_epsilon",
    "k_norm_epsilon",
}
_DEFAULT_NORM_EPSILON = 1e-6
_PROJECTIONS = ("Add", "Gemm", "MatMul", "MatMulNBits")


@dataclass(frozen=True)
class GroupQueryAttentionSite(AttentionSite):
    """One GroupQueryAttention node; see `AttentionSite`.

    Attributes:
        query: The node's input; query, key and value side by side where `key` is empty.
        key: (batch, sequence, key-value heads * head size), or empty.
        value: As key.
        rotary: cos and sin tables, (positions, rotary size / 2), where the node embeds positions.
        rotary_size: How much of a head is embedded; None for all, or where the graph doesn't say.
        interleaved: How pairs of the rotary embedding lie.
        position_ids: The node's own; empty where it counts the mask.
        norms: Weights of the query's and key's RMS norm, (head size,), where the node has them.
        norm_epsilons: Of these.
    """

    query: str = ""
    key: str = ""
    value: str = ""
    rotary: tuple[str, str] | None = None
    rotary_size: int | None = None
    interleaved: int = 0
    position_ids: str = ""
    norms: tuple[str, str] | None = None
    norm_epsilons: tuple[float, float] = (_DEFAULT_NORM_EPSILON, _DEFAULT_NORM_EPSILON)

    @property
    def shares_buffers(self) -> bool:
        """See `AttentionSite`."""
        return True

    @property
    def runs_on_cpu(self) -> bool:
        """See `AttentionSite`; its own norms are for GPUs only."""
        return self.norms is None

    def operands(self, build: NodeBuilder) -> tuple[str, str, str]:
        """See `AttentionSite`."""
        assert self.terms is not None
        query, key, value = self._separate(build)
        if self.norms is not None:
            query = self._norm(build, query, self.terms.num_heads, 0, "query")
            key = self._norm(build, key, self.terms.kv_num_heads, 1, "key")
        if self.rotary is not None:
            query = self._rotate(build, query, self.terms.num_heads, "query")
            key = self._rotate(build, key, self.terms.kv_num_heads, "key")
        return query, key, value

    def cuts(self, head_size: int) -> Mapping[str, Sequence[Dimension]]:
        """See `AttentionSite`."""
        assert self.terms is not None
        heads, kv_heads = self.terms.num_heads, self.terms.kv_num_heads
        if not self.key:
            return {self.query: ("batch", "sequence", (heads + 2 * kv_heads) * head_size)}
        widths = {self.query: heads, self.key: kv_heads, self.value: kv_heads}
        return {name: ("batch", "sequence", count * head_size) for name, count in widths.items()}

    def _separate(self, build: NodeBuilder) -> tuple[str, str, str]:
        """Query, key and value of their own; a packed tensor is cut up, by heads where their size isn't known."""
        assert self.terms is not None
        if self.key:
            return self.query, self.key, self.value
        names = ("query", "key", "value")
        heads, kv_heads, size = self.terms.num_heads, self.terms.kv_num_heads, self.terms.head_size
        if size is not None:
            sizes = build.constant([heads * size, kv_heads * size, kv_heads * size], "packed_sizes")
            parts = build.add_many("Split", [self.query, sizes], "unpack", [build.prefix + n for n in names], axis=-1)
            query, key, value = parts
            return query, key, value
        whole = build.constant([0, 0, heads + 2 * kv_heads, -1], "packed_shape")
        rows = build.add("Reshape", [self.query, whole], "packed_heads")
        parts = [build.prefix + f"{name}_heads" for name in names]
        sizes = build.constant([heads, kv_heads, kv_heads], "packed_sizes")
        build.add_many("Split", [rows, sizes], "unpack", parts, axis=2)
        flat = build.constant([0, 0, -1], "flat_shape")
        query, key, value = (build.add("Reshape", [part, flat], name) for part, name in zip(parts, names, strict=True))
        return query, key, value

    def _norm(self, build: NodeBuilder, flat: str, heads: int, which: int, name: str) -> str:
        assert self.norms is not None
        whole = build.constant([0, 0, heads, -1], f"{name}_norm_shape")
        rows = build.add("Reshape", [flat, whole], f"{name}_norm_rows")
        normed = build.add(
            "SimplifiedLayerNormalization",
            [rows, self.norms[which]],
            f"{name}_norm",
            axis=-1,
            epsilon=self.norm_epsilons[which],
            stash_type=1,
        )
        return build.add("Reshape", [normed, build.constant([0, 0, -1], f"{name}_normed_shape")], f"{name}_normed")

    def _rotate(self, build: NodeBuilder, flat: str, heads: int, name: str) -> str:
        assert self.rotary is not None
        partly: dict[str, Any] = {} if self.rotary_size is None else {"rotary_embedding_dim": self.rotary_size}
        return build.add(
            "RotaryEmbedding",
            [flat, self.position_ids or POSITIONS, *self.rotary],
            f"{name}_rotary",
            domain=MICROSOFT,
            interleaved=self.interleaved,
            num_heads=heads,
            **partly,
        )


def find(graph: Graph) -> Iterator[GroupQueryAttentionSite]:
    """The GroupQueryAttention nodes of a graph, in its order."""
    for node in graph.proto.node:
        if node.op_type == "GroupQueryAttention" and node.domain == MICROSOFT:
            yield _site(graph, node)


def _site(graph: Graph, node: onnx.NodeProto) -> GroupQueryAttentionSite:
    inputs = dict(zip(_INPUTS, [*node.input, *[""] * len(_INPUTS)], strict=False))
    outputs = [*node.output, "", ""]
    cache = CacheNames(inputs["past_key"], inputs["past_value"], outputs[1], outputs[2])
    layer = layer_of(cache.past_key)
    norms = (inputs["q_norm_weight"], inputs["k_norm_weight"])
    rotary = bool(attribute(node, "do_rotary", 0))
    num_heads, kv_num_heads = attribute(node, "num_heads"), attribute(node, "kv_num_heads")
    head_size = _head_size(graph, inputs, num_heads if inputs["key"] else num_heads + 2 * kv_num_heads)
    rotary_size = _rotary_size(graph, inputs) if rotary else None
    scale = attribute(node, "scale", 0.0)
    problem = _problem(node, inputs, cache)
    if not scale and head_size is None:
        problem = problem or f"{describe(node)} has no scale, and the graph doesn't say its head size"
    return GroupQueryAttentionSite(
        layer=-1 if layer is None else layer,
        nodes=(node,),
        terms=AttentionTerms(
            num_heads=num_heads,
            kv_num_heads=kv_num_heads,
            head_size=head_size,
            scale=scale or (head_size or 1) ** -0.5,
            softcap=attribute(node, "softcap", 0.0),
            sliding_window=_window(attribute(node, "local_window_size", -1)),
        ),
        cache=cache,
        output=node.output[0],
        problem=problem,
        query=inputs["query"],
        key=inputs["key"],
        value=inputs["value"],
        rotary=(inputs["cos_cache"], inputs["sin_cache"]) if rotary else None,
        rotary_size=rotary_size if rotary_size != head_size else None,
        interleaved=attribute(node, "rotary_interleaved", 0),
        position_ids=inputs["position_ids"],
        norms=norms if all(norms) else None,
        norm_epsilons=_epsilons(node),
    )


def _epsilons(node: onnx.NodeProto) -> tuple[float, float]:
    both = attribute(node, "qk_norm_epsilon", _DEFAULT_NORM_EPSILON)
    return attribute(node, "q_norm_epsilon", both), attribute(node, "k_norm_epsilon", both)


def _window(local_window_size: int) -> int:
    """The operator counts the row's own key."""
    return local_window_size if local_window_size > 0 else -1


def _head_size(graph: Graph, inputs: Mapping[str, str], heads: int) -> int | None:
    """By the cache's shape, or by the width of the query, which has so many heads."""
    shape = graph.shape(inputs["past_key"])
    if shape is not None and len(shape) == 4 and shape[3] is not None:
        return shape[3]
    width = _width(graph, inputs["query"])
    return width // heads if width and width % heads == 0 else None


def _width(graph: Graph, value: str) -> int | None:
    """Last dimension of a value, as the graph declares it or the weights say that make it."""
    shape = graph.shape(value)
    if shape and shape[-1] is not None:
        return shape[-1]
    node = graph.producer(value)
    if node is None or node.op_type not in _PROJECTIONS or attribute(node, "transB", 0):
        return None
    weights = [graph.initializers[name].dims for name in node.input if name in graph.initializers]
    found: int | None = attribute(node, "N") or max((dims[-1] for dims in weights if dims), default=None)
    return found  # N: of a quantised matrix product, whose weights have another shape


def _rotary_size(graph: Graph, inputs: Mapping[str, str]) -> int | None:
    table = graph.shape(inputs["cos_cache"])
    return 2 * table[1] if table is not None and len(table) == 2 and table[1] is not None else None


def _problem(node: onnx.NodeProto, inputs: Mapping[str, str], cache: CacheNames) -> str | None:
    for name, what in _UNSUPPORTED_INPUTS.items():
        if inputs[name]:
            return f"{describe(node)} has {what} (its input {name}), which the operator can't compute"
    for given in node.attribute:
        value = attribute(node, given.name)
        if given.name in _NEUTRAL and value not in _NEUTRAL[given.name]:
            return f"{describe(node)} has {given.name} = {value!r}, which the operator can't compute"
        if given.name not in _NEUTRAL and given.name not in _KNOWN:
            return f"{describe(node)} has an attribute {given.name!r} that this version of act-export doesn't know"
    if not all((cache.past_key, cache.past_value, cache.present_key, cache.present_value)):
        return f"{describe(node)} has no cache; export the model with past_key_values"
    if bool(inputs["q_norm_weight"]) != bool(inputs["k_norm_weight"]):
        return f"{describe(node)} normalises only one of query and key"
    return None
