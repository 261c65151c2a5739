"""Where a model's attention sinks are, and the report that shows them."""

from act_export.profile.run import ProfileOptions, PromptSource, profile_sinks
from act_export.profile.sink_profile import SinkProfile, unreachable
from act_export.profile.sink_statistics import (
    ALL,
    GRID,
    MODES,
    POSITION_EDGES,
    RELATIVE_BINS,
    ExamplePrompt,
    LaterSinks,
    SinkStatistics,
    SinkTokens,
)

__all__ = [
    "ALL",
    "GRID",
    "MODES",
    "POSITION_EDGES",
    "RELATIVE_BINS",
    "ExamplePrompt",
    "LaterSinks",
    "ProfileOptions",
    "PromptSource",
    "SinkProfile",
    "SinkStatistics",
    "SinkTokens",
    "profile_sinks",
    "unreachable",
]
