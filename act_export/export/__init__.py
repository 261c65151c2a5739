"""transformers model -> ONNX model with the calibration inside."""

from act_export.export.build import build_model

__all__ = ["build_model"]
