"""Running exported models in ONNX Runtime."""

from act_export.onnx_file.state import State, select
from act_export.runtime.cache import Cache
from act_export.runtime.generate import generate, generate_steps
from act_export.runtime.node_placement import NodePlacement
from act_export.runtime.sampling import Sampling
from act_export.runtime.session import RunOutputs, Session

__all__ = [
    "Cache",
    "NodePlacement",
    "RunOutputs",
    "Sampling",
    "Session",
    "State",
    "generate",
    "generate_steps",
    "select",
]
