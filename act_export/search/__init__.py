"""Which heads to calibrate."""

from act_export.search.heads import search_heads
from act_export.search.request import SearchOptions, SearchTask, Threshold
from act_export.search.results import SearchResult, TaskReport

__all__ = ["SearchOptions", "SearchResult", "SearchTask", "TaskReport", "Threshold", "search_heads"]
