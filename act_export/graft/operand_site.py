"""An attention operator that takes query, key and value as values of the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from act_export.graft.site import AttentionSite, Dimension, Layout
from act_export.onnx_file.node_builder import NodeBuilder


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
