"""Which heads to calibrate."""

from act_export.attention.fast_attention import FastAttention
from act_export.search.gates import GatedAttention, gate_gradients
from act_export.search.heads import search_heads
from act_export.search.processes import process_group
from act_export.search.request import HEAD_COUNTS, METHODS, SearchOptions, SearchTask, Threshold
from act_export.search.results import SearchResult, TaskReport

__all__ = [
    "HEAD_COUNTS",
    "METHODS",
    "FastAttention",
    "GatedAttention",
    "SearchOptions",
    "SearchResult",
    "SearchTask",
    "TaskReport",
    "Threshold",
    "gate_gradients",
    "process_group",
    "search_heads",
]
