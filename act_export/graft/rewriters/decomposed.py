"""Attention of single operators, MatMul - Softmax - MatMul, as optimum and torch's exporters write it.

Exporters differ in how they scale, mask, cap and repeat heads. So only the two products, the softmax and the joining
of the cache are looked for; what lies between them is run on numbers, and taken for what it computes; see
`act_export.graft.mask`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from act_export.graft.graph import Graph, UnsupportedPatternError, attribute, describe, reads
from act_export.graft.mask import LogitPart, read_logits
from act_export.graft.probe import Part
from act_export.graft.site import (
    AttentionSite,
    AttentionTerms,
    CacheNames,
    Dimension,
    is_cache_input,
    layer_of,
)
from act_export.graft.surroundings import flat_output, unused_nodes
from act_export.onnx_file.node_builder import NodeBuilder

_RANK = 4
_TOKENS_AXIS = (2, -2)
_LAST_AXIS = (3, -1)
_FARTHEST = 8  # values between softmax and product: type, padding rows, dropout
_TOLERANCE: dict[int, float] = {TensorProto.FLOAT: 1e-5, TensorProto.FLOAT16: 2e-3}


@dataclass(frozen=True)
class DecomposedSite(AttentionSite):
    """An attention of single operators; see `AttentionSite`.

    Attributes:
        query: (batch, heads, sequence, head size), rotary applied, before any scale.
        key: New keys, (batch, key-value heads, sequence, head size), rotary applied.
        value: As key.
        embeddings: Width of token embeddings whose shape the mask depends on, by name.
    """

    query: str = ""
    key: str = ""
    value: str = ""
    embeddings: Mapping[str, int] = field(default_factory=dict)

    def operands(self, build: NodeBuilder) -> tuple[str, str, str]:
        """See `AttentionSite`."""
        return (
            build.flatten_heads(self.query, "query"),
            build.flatten_heads(self.key, "key"),
            build.flatten_heads(self.value, "value"),
        )

    def cuts(self, head_size: int) -> Mapping[str, Sequence[Dimension]]:
        """See `AttentionSite`."""
        assert self.terms is not None
        heads = {
            self.query: self.terms.num_heads,
            self.key: self.terms.kv_num_heads,
            self.value: self.terms.kv_num_heads,
        }
        found: dict[str, Sequence[Dimension]] = {
            name: ("batch", count, "sequence", head_size) for name, count in heads.items()
        }
        return {**found, **{name: ("batch", "sequence", width) for name, width in self.embeddings.items()}}


def find(graph: Graph) -> Iterator[DecomposedSite]:
    """The attentions with a cache, in the graph's order."""
    for node in graph.proto.node:
        if node.op_type == "Softmax" and node.domain == "":
            core = _core(graph, node)
            if core is not None:
                yield _site(graph, core)


@dataclass(frozen=True)
class _Core:
    """The nodes that make an attention."""

    product: onnx.NodeProto
    softmax: onnx.NodeProto
    mix: onnx.NodeProto
    key: onnx.NodeProto
    value: onnx.NodeProto

    @property
    def cache(self) -> CacheNames:
        return CacheNames(self.key.input[0], self.value.input[0], self.key.output[0], self.value.output[0])


def _core(graph: Graph, softmax: onnx.NodeProto) -> _Core | None:
    mix = _mix_after(graph, softmax)
    if mix is None:
        return None
    value = next(_cache_joins(graph, mix.input[1]), None)
    for product in _products_before(graph, softmax.input[0]):
        key = next(_cache_joins(graph, product.input[1]), None)
        if key is not None and value is not None and key is not value:
            return _Core(product, softmax, mix, key, value)
    return None


def _mix_after(graph: Graph, softmax: onnx.NodeProto) -> onnx.NodeProto | None:
    """The product with the values: the first that the probabilities go into from the left."""
    waiting, seen = [softmax.output[0]], set[str]()
    while waiting:
        name = waiting.pop(0)
        seen.add(name)
        for node in graph.consumers(name):
            if node.op_type == "MatMul":
                return node if node.input[0] == name else None
            waiting.extend(each for each in node.output if each not in seen)
        if len(seen) > _FARTHEST:
            return None
    return None


def _products_before(graph: Graph, value: str) -> Iterator[onnx.NodeProto]:
    return (node for node in _ancestors(graph, value, stop=("MatMul", "Shape")) if node.op_type == "MatMul")


def _cache_joins(graph: Graph, value: str) -> Iterator[onnx.NodeProto]:
    """The nodes that join new keys or values to those of the cache."""
    for node in _ancestors(graph, value, stop=("MatMul", "Shape", "Concat")):
        if node.op_type == "Concat" and len(node.input) == 2 and is_cache_input(graph, node.input[0]):
            yield node


def _ancestors(graph: Graph, value: str, stop: Sequence[str]) -> Iterator[onnx.NodeProto]:
    """The nodes that a value comes from, the nearest first, up to operators where the search ends."""
    waiting, seen = [value], {value}
    while waiting:
        node = graph.producer(waiting.pop(0))
        if node is None:
            continue
        yield node
        if node.op_type not in stop:
            names = [name for name in reads(node) if name not in seen]
            waiting.extend(names)
            seen.update(names)


def _site(graph: Graph, core: _Core) -> DecomposedSite:
    cache = core.cache
    layer = layer_of(cache.past_key)
    output, layout = flat_output(graph, core.mix.output[0])
    found = DecomposedSite(
        layer=-1 if layer is None else layer,
        nodes=(core.product, core.softmax, core.mix),
        terms=None,
        cache=cache,
        output=output,
        output_layout=layout,
        key=core.key.input[1],
        value=core.value.input[1],
    )
    try:
        return _Reader(graph, core, found).read()
    except UnsupportedPatternError as error:
        return DecomposedSite(**{**vars(found), "problem": f"{describe(core.softmax)}: {error}"})


class _Reader:
    """Runs the parts of an attention and reads off what they do."""

    def __init__(self, graph: Graph, core: _Core, found: DecomposedSite) -> None:
        self._graph, self._core, self._found = graph, core, found
        shape = graph.shape(found.cache.past_key)
        if shape is None or len(shape) != _RANK or shape[1] is None or shape[3] is None:
            raise UnsupportedPatternError(f"the shape of {found.cache.past_key} doesn't say its heads and their size")
        self._kv_heads, self._size = shape[1], shape[3]
        kind = graph.element_type(found.cache.past_key)
        if kind not in _TOLERANCE:
            raise UnsupportedPatternError("only float32 and float16 can be recognised")
        self._tolerance = _TOLERANCE[kind]
        self._dtype = helper.tensor_dtype_to_np_dtype(kind)

    def read(self) -> DecomposedSite:
        """The site, with its terms.

        Raises:
            UnsupportedPatternError: If the attention is something else.
        """
        core, found = self._core, self._found
        self._check_core()
        group, key_scale = self._repeats(core.product.input[1], found.cache.present_key, transposed=True)
        if self._repeats(core.mix.input[1], found.cache.present_value, transposed=False) != (group, 1.0):
            raise UnsupportedPatternError("values are scaled, or repeated in another way than keys")
        heads = group * self._kv_heads
        query, query_scale = self._query(heads)
        self._check_probabilities(heads)
        logits = self._logits(heads, query)
        read = read_logits(logits)
        terms = AttentionTerms(
            num_heads=heads,
            kv_num_heads=self._kv_heads,
            head_size=self._size,
            scale=query_scale * key_scale * read.scale,
            softcap=read.softcap,
            sliding_window=read.sliding_window,
        )
        ends = (found.output, found.cache.present_key, found.cache.present_value)
        return replace(
            found,
            query=query,
            terms=terms,
            nodes=unused_nodes(self._graph, ends, (query, found.key, found.value)),
            takes_chunks=read.takes_chunks,
            embeddings=logits.part.embeddings,
        )

    def _check_core(self) -> None:
        core = self._core
        for join in (core.key, core.value):
            if attribute(join, "axis") not in _TOKENS_AXIS:
                raise UnsupportedPatternError(f"{describe(join)} joins along axis {attribute(join, 'axis')}, not 2")
            if join.output[0] not in self._graph.outputs:
                raise UnsupportedPatternError(f"{describe(join)} makes no output of the graph")
        if attribute(core.softmax, "axis", -1) not in _LAST_AXIS:
            raise UnsupportedPatternError("its axis isn't the last")

    def _repeats(self, used: str, present: str, *, transposed: bool) -> tuple[int, float]:
        """How often each head of the cache is used, and by what it is multiplied.

        Args:
            used: What the product gets.
            present: The whole cache, (batch, key-value heads, tokens, head size).
            transposed: Whether the last two axes change places.
        """
        query = {name: np.full((2, 1, 3, self._size), np.nan, self._dtype) for name in self._scalings()}
        random = np.random.default_rng(0)
        given = random.standard_normal((2, self._kv_heads, 5, self._size)).astype(self._dtype)
        got = self._part(used, [present, *query]).run({**query, present: given}).astype(np.float64)
        got = np.swapaxes(got, -1, -2) if transposed else got
        group, rest = divmod(got.shape[1], self._kv_heads) if got.ndim == _RANK else (0, 0)
        wanted = np.repeat(given.astype(np.float64), max(group, 1), axis=1)
        if rest or got.shape != wanted.shape:
            raise UnsupportedPatternError(f"{present} of shape {given.shape} becomes {used} of shape {got.shape}")
        return group, self._factor(used, got, wanted)

    def _factor(self, name: str, got: NDArray[np.float64], wanted: NDArray[np.float64]) -> float:
        """The number that makes one array of another."""
        factor = float((got * wanted).sum() / (wanted * wanted).sum()) if got.shape == wanted.shape else 0.0
        allowed = self._tolerance * abs(factor) * np.abs(wanted).max()
        if not factor or not np.abs(got - factor * wanted).max() <= allowed:
            raise UnsupportedPatternError(f"{name} isn't what it was made from, times a number")
        return 1.0 if abs(factor - 1) <= self._tolerance else factor

    def _scalings(self) -> list[str]:
        """The query as the product gets it, and before each multiplication on its way there, the last first."""
        names = [self._core.product.input[0]]
        while (node := self._graph.producer(names[-1])) is not None and node.op_type in ("Mul", "Div"):
            names.append(next(name for name in [*node.input, ""] if self._graph.constant(name) is None))
        return names

    def _query(self, heads: int) -> tuple[str, float]:
        """The query before it is scaled, and its scale."""
        given = np.random.default_rng(0).standard_normal((2, heads, 3, self._size)).astype(self._dtype)
        scaled, *earlier = self._scalings()
        query, scale = scaled, 1.0
        for name in earlier:
            try:
                got = self._part(scaled, [name]).run({name: given}).astype(np.float64)
                query, scale = name, self._factor(scaled, got, given.astype(np.float64))
            except UnsupportedPatternError:  # another multiplication, as of a norm or a rotary embedding
                break
        return query, scale

    def _check_probabilities(self, heads: int) -> None:
        """Between softmax and values nothing may happen to numbers."""
        part = self._part(self._core.mix.input[0], [self._core.softmax.output[0]])
        given = np.random.default_rng(0).random((2, heads, 3, 5)).astype(self._dtype)
        got = part.run({self._core.softmax.output[0]: given})
        if got.shape != given.shape or not np.array_equal(got, given):
            raise UnsupportedPatternError("its probabilities are changed before they meet the values")

    def _logits(self, heads: int, query: str) -> LogitPart:
        core, found = self._core, self._found
        names = self._scalings()
        queries = names[: names.index(query) + 1]
        shapes = {
            **dict.fromkeys(queries, (heads, "sequence", self._size)),
            found.key: (self._kv_heads, "sequence", self._size),
            found.value: (self._kv_heads, "sequence", self._size),
        }
        product = core.product.output[0]
        part = self._part(core.softmax.input[0], [product, *shapes])
        return LogitPart(part, product, heads, self._dtype, shapes)

    def _part(self, output: str, given: Sequence[str]) -> Part:
        return Part(self._graph, output, given)
