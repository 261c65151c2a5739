"""Which heads to calibrate.

Names are imported when first used: what is asked for can be checked without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from act_export.lazy_names import lazy_names

if TYPE_CHECKING:
    from act_export.search.request import SearchOptions as SearchOptions
    from act_export.search.request import SearchTask as SearchTask
    from act_export.search.request import Threshold as Threshold
    from act_export.search.results import SearchResult as SearchResult
    from act_export.search.results import TaskReport as TaskReport
    from act_export.search.run import search_heads as search_heads

_HOMES = {
    "SearchOptions": "act_export.search.request",
    "SearchResult": "act_export.search.results",
    "SearchTask": "act_export.search.request",
    "TaskReport": "act_export.search.results",
    "Threshold": "act_export.search.request",
    "search_heads": "act_export.search.run",
}
__all__ = list(_HOMES)
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
