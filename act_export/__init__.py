"""act-export: attention sink calibration baked into ONNX models.

    checkpoint = load_checkpoint("smollm2-135m")
    export_model(checkpoint, Calibration.load("calibration.json"), Path("calibrated.onnx"))
    with Session.open("calibrated.onnx") as session:
        tokens = generate(session, [[1, 2, 3]], max_new_tokens=16)

Names are imported when first used: running a model needs neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from act_export.lazy_names import lazy_names as _lazy_names
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
    "ActExportError": "act_export.errors",
    "BenchRequest": "act_export.verify.bench.measurements",
    "Calibration": "act_export.calibration",
    "Checkpoint": "act_export.checkpoint.load",
    "Sampling": "act_export.runtime.sampling",
    "Session": "act_export.runtime.session",
    "SinkProfile": "act_export.profile",
    "bench_file": "act_export.verify.bench.job",
    "calibrate_probabilities": "act_export.calibration.reference",
    "export_model": "act_export.export.job",
    "generate": "act_export.runtime.generate",
    "library_path": "act_export.ops.library",
    "load_checkpoint": "act_export.checkpoint.load",
    "search_heads": "act_export.search",
    "verify_sessions": "act_export.verify.parity.sessions",
}

__all__ = [*_HOMES, "__version__"]
__getattr__, __dir__ = _lazy_names(__name__, _HOMES, "__version__")
