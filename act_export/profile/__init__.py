"""Where a model's attention sinks are, and the report that shows them.

Names are imported when first used: what is asked for can be checked, and a profile read, without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from act_export.lazy_names import lazy_names

if TYPE_CHECKING:
    from act_export.profile.request import ProfileOptions as ProfileOptions
    from act_export.profile.request import PromptSource as PromptSource
    from act_export.profile.run import profile_sinks as profile_sinks
    from act_export.profile.sink_profile import SinkProfile as SinkProfile
    from act_export.profile.sink_profile import unreachable as unreachable
    from act_export.profile.sink_statistics import ALL as ALL
    from act_export.profile.sink_statistics import GRID as GRID
    from act_export.profile.sink_statistics import MODES as MODES
    from act_export.profile.sink_statistics import POSITION_EDGES as POSITION_EDGES
    from act_export.profile.sink_statistics import RELATIVE_BINS as RELATIVE_BINS
    from act_export.profile.sink_statistics import ExamplePrompt as ExamplePrompt
    from act_export.profile.sink_statistics import LaterSinks as LaterSinks
    from act_export.profile.sink_statistics import SinkStatistics as SinkStatistics
    from act_export.profile.sink_statistics import SinkTokens as SinkTokens

_HOMES = {
    "ALL": "act_export.profile.sink_statistics",
    "ExamplePrompt": "act_export.profile.sink_statistics",
    "GRID": "act_export.profile.sink_statistics",
    "LaterSinks": "act_export.profile.sink_statistics",
    "MODES": "act_export.profile.sink_statistics",
    "POSITION_EDGES": "act_export.profile.sink_statistics",
    "ProfileOptions": "act_export.profile.request",
    "PromptSource": "act_export.profile.request",
    "RELATIVE_BINS": "act_export.profile.sink_statistics",
    "SinkProfile": "act_export.profile.sink_profile",
    "SinkStatistics": "act_export.profile.sink_statistics",
    "SinkTokens": "act_export.profile.sink_statistics",
    "profile_sinks": "act_export.profile.run",
    "unreachable": "act_export.profile.sink_profile",
}
__all__ = list(_HOMES)
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
