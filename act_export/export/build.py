"""From a loaded checkpoint to an ONNX file, without verification."""

from __future__ import annotations

from pathlib import Path

from act_export.calibration import Calibration
from act_export.checkpoint import Checkpoint
from act_export.export.slim import slim
from act_export.export.trace import trace
from act_export.export.write import check_model, finish_model, metadata, save_model


def build_model(checkpoint: Checkpoint, calibration: Calibration | None, path: Path, *, source: str = "") -> None:
    """Exports a checkpoint: graph at `path`, weights at `path` + ".data".

    Args:
        checkpoint: The model.
        calibration: Baked into the attention nodes; None or one without heads gives the plain baseline.
        path: The ONNX file; its folder must exist.
        source: Recorded in the file as what it was made from.

    Raises:
        CalibrationError: If the calibration doesn't fit the model.
        UnsupportedModelError: If the model's attention can't be replaced.
        OutputError: If the disk is too full.
    """
    if calibration is not None:
        calibration.check_fits(checkpoint.identity)
    model = slim(trace(checkpoint.model, calibration), weight_prefix="model.")
    finish_model(model, metadata(calibration, checkpoint, source))
    save_model(model, path)
    check_model(path)
