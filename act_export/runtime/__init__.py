"""Running exported models in ONNX Runtime."""

from act_export.runtime.generate import Sampling, generate, generate_steps
from act_export.runtime.session import RunOutputs, Session, State

__all__ = ["RunOutputs", "Sampling", "Session", "State", "generate", "generate_steps"]
