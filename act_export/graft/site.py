"""What a rewriter finds of a layer's attention: all that is needed to put the operator in its place."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

import onnx

from act_export.graft.graph import Graph
from act_export.onnx_file.node_builder import NodeBuilder

Dimension = int | str
"""A number, or "batch", "sequence", "past", "total" (= past + sequence)."""

_NUMBER = re.compile(r"\d+")


class Layout(Enum):
    """How heads lie in a tensor."""

    FLAT = "(batch, sequence, heads * head size)"
    HEADS = "(batch, heads, sequence, head size)"


@dataclass(frozen=True)
class CacheNames:
    """Graph inputs and outputs of a layer's cache, each (batch, key-value heads, tokens, head size)."""

    past_key: str
    past_value: str
    present_key: str
    present_value: str


@dataclass(frozen=True)
class AttentionTerms:
    """An attention in the operator's terms; see `act_export.ops.schema`.

    Attributes:
        num_heads: Query heads.
        kv_num_heads: Key and value heads.
        head_size: None where the graph doesn't say; it isn't needed then.
        scale: Multiplies the logits.
        softcap: 0 for none.
        sliding_window: Number of keys a row sees, itself included; -1 for all.
        sink_logits: Learned sink logits, one for all query heads or one each; empty for none.
    """

    num_heads: int
    kv_num_heads: int
    head_size: int | None
    scale: float
    softcap: float = 0.0
    sliding_window: int = -1
    sink_logits: tuple[float, ...] = ()


@dataclass(frozen=True)
class AttentionSite(ABC):
    """A layer's attention in a graph; each rewriter has a kind of its own.

    Attributes:
        layer: From 0.
        nodes: What the operator replaces, in the graph's order. Nothing else reads what they make, apart from `output`
            and the cache's present values.
        terms: The attention; None where `problem` says why the operator can't stand in for it.
        cache: Of the layer.
        output: The value that the rest of the graph goes on with.
        output_layout: Its layout.
        problem: Why this attention can't be calibrated, naming the node; an error only if the layer should be.
        takes_chunks: Whether the nodes that are replaced can run several tokens after others in the cache.
    """

    layer: int
    nodes: tuple[onnx.NodeProto, ...]
    terms: AttentionTerms | None
    cache: CacheNames
    output: str
    output_layout: Layout = Layout.FLAT
    problem: str | None = None
    takes_chunks: bool = True

    @property
    def shares_buffers(self) -> bool:
        """Whether the nodes that are replaced can write their cache in place, in a buffer longer than its contents.

        So can the operator; where other layers can't, the model's callers don't.
        """
        return False

    @property
    def runs_on_cpu(self) -> bool:
        """Whether ONNX Runtime has a kernel of the nodes that are replaced for a CPU."""
        return True

    @abstractmethod
    def operands(self, build: NodeBuilder) -> tuple[str, str, str]:
        """Adds nodes that make the operator's query, key and value, and returns the names of these.

        All three are `Layout.FLAT`, rotary embedding applied, key and value with their own number of heads.
        """

    @abstractmethod
    def cuts(self, head_size: int) -> Mapping[str, Sequence[Dimension]]:
        """The values that the layer's projections make, from which everything else here is computed, with shapes.

        The check of a rewritten layer gives random numbers for these, and runs both ways of going on.
        """


def layer_of(name: str) -> int | None:
    """The layer's number in the name of a cache input, e.g. 3 of "past_key_values.3.key"; None if there is none."""
    found = _NUMBER.search(name)
    return int(found.group()) if found else None


def is_cache_input(graph: Graph, value: str) -> bool:
    """Whether a value is an input of the graph that can be a layer's cache."""
    return value in graph.inputs and layer_of(value) is not None


@dataclass(frozen=True)
class OperandSite(AttentionSite):
    """See `AttentionSite`.

    Attributes:
        query: New queries, rotary applied.
        key: New keys, rotary applied, with their own number of heads.
        value: As key.
        query_layout: Of the query.
        key_layout: Of key and value.
        embeddings: Width of token embeddings whose shape the mask depends on, by name.
    """

    query: str = ""
    key: str = ""
    value: str = ""
    query_layout: Layout = Layout.FLAT
    key_layout: Layout = Layout.FLAT
    embeddings: Mapping[str, int] = field(default_factory=dict)

    def operands(self, build: NodeBuilder) -> tuple[str, str, str]:
        """See `AttentionSite`."""
        return (
            _flat(build, self.query, self.query_layout, "query"),
            _flat(build, self.key, self.key_layout, "key"),
            _flat(build, self.value, self.key_layout, "value"),
        )

    def cuts(self, head_size: int) -> Mapping[str, Sequence[Dimension]]:
        """See `AttentionSite`."""
        assert self.terms is not None
        heads, kv_heads = self.terms.num_heads, self.terms.kv_num_heads
        return {
            self.query: _shape(self.query_layout, heads, head_size),
            self.key: _shape(self.key_layout, kv_heads, head_size),
            self.value: _shape(self.key_layout, kv_heads, head_size),
            **{name: ("batch", "sequence", width) for name, width in self.embeddings.items()},
        }


def _flat(build: NodeBuilder, value: str, layout: Layout, name: str) -> str:
    return value if layout is Layout.FLAT else build.flatten_heads(value, name)


def _shape(layout: Layout, heads: int, head_size: int) -> Sequence[Dimension]:
    if layout is Layout.FLAT:
        return "batch", "sequence", heads * head_size
    return "batch", heads, "sequence", head_size
