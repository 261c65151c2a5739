"""act-export: attention sink calibration baked into ONNX models.

    checkpoint = load_checkpoint("smollm2-135m")
    export_model(checkpoint, Calibration.load("calibration.json"), Path("calibrated.onnx"))
    with Session.open("calibrated.onnx") as session:
        tokens = generate(session, [[1, 2, 3]], max_new_tokens=16)

Names are imported when first used: running a model needs neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from act_export.version import __version__ as __version__

if TYPE_CHECKING:
    from act_export.calibration.file import Calibration as Calibration
    from act_export.calibration.reference import calibrate_probabilities as calibrate_probabilities
    from act_export.checkpoint.load import Checkpoint as Checkpoint
    from act_export.checkpoint.load import load_checkpoint as load_checkpoint
    from act_export.errors import ActExportError as ActExportError
    from act_export.export.job import export_model as export_model
    from act_export.ops.library import library_path as library_path
    from act_export.profile import SinkProfile as SinkProfile
    from act_export.runtime.generate import generate as generate
    from act_export.runtime.sampling import Sampling as Sampling
    from act_export.runtime.session import Session as Session
    from act_export.search import search_heads as search_heads
    from act_export.verify.bench.job import bench_file as bench_file
    from act_export.verify.bench.measurements import BenchRequest as BenchRequest
    from act_export.verify.parity.sessions import verify_sessions as verify_sessions

_HOMES = {
    "ActExportError": "errors",
    "BenchRequest": "verify.bench.measurements",
    "Calibration": "calibration",
    "Checkpoint": "checkpoint.load",
    "Sampling": "runtime.sampling",
    "Session": "runtime.session",
    "SinkProfile": "profile",
    "bench_file": "verify.bench.job",
    "calibrate_probabilities": "calibration.reference",
    "export_model": "export.job",
    "generate": "runtime.generate",
    "library_path": "ops.library",
    "load_checkpoint": "checkpoint.load",
    "search_heads": "search",
    "verify_sessions": "verify.parity.sessions",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    """Imports a public name from its module."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
