"""Calibrating models that somebody else exported: ONNX model -> calibrated ONNX model, and back."""

from act_export.graft.graph import UnsupportedPatternError
from act_export.graft.job import Grafted, Removed, graft, remove_graft
from act_export.graft.sink_state import StateLayout

__all__ = [
    "Grafted",
    "Removed",
    "StateLayout",
    "UnsupportedPatternError",
    "graft",
    "remove_graft",
]
