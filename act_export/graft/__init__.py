"""Calibrating models that somebody else exported: ONNX model -> calibrated ONNX model, and back.

Names are imported when first used: what is asked for can be checked first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from act_export.lazy_names import lazy_names

if TYPE_CHECKING:
    from act_export.graft.graph import UnsupportedPatternError as UnsupportedPatternError
    from act_export.graft.job import Grafted as Grafted
    from act_export.graft.job import Removed as Removed
    from act_export.graft.job import graft as graft
    from act_export.graft.job import remove_graft as remove_graft
    from act_export.graft.sink_state import StateLayout as StateLayout

_HOMES = {
    "Grafted": "act_export.graft.job",
    "Removed": "act_export.graft.job",
    "StateLayout": "act_export.graft.sink_state",
    "UnsupportedPatternError": "act_export.graft.graph",
    "graft": "act_export.graft.job",
    "remove_graft": "act_export.graft.job",
}
__all__ = list(_HOMES)
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
