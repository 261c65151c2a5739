"""The calibration: its definition in the paper's letters, its file, and the recipes that are shipped."""

from act_export.calibration.file import Calibration, CalibrationError, ModelIdentity, Provenance

__all__ = ["Calibration", "CalibrationError", "ModelIdentity", "Provenance"]
