"""Which heads to calibrate."""

from act_export.search.request import SearchOptions, SearchTask, Threshold
from act_export.search.results import SearchResult, TaskReport
from act_export.search.run import search_heads

__all__ = ["SearchOptions", "SearchResult", "SearchTask", "TaskReport", "Threshold", "search_heads"]
