"""act-export: attention sink calibration baked into ONNX models."""

__version__ = "0.1.0"
