"""A rewriter for each way in which exporters write attention; see `find_sites`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from act_export.graft.graph import Graph
from act_export.graft.rewriters import (
    act_attention,
    decomposed,
    group_query_attention,
    multi_head_attention,
    onnx_attention,
)
from act_export.graft.site import AttentionSite

Finder = Callable[[Graph], Iterator[AttentionSite]]

FINDERS: tuple[Finder, ...] = (
    act_attention.find,
    group_query_attention.find,
    multi_head_attention.find,
    onnx_attention.find,
    decomposed.find,
)
