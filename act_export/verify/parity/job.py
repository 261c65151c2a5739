"""Parity of a file against PyTorch."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from act_export.calibration.calibration_set import CalibrationSet
from act_export.calibration.file import Calibration
from act_export.checkpoint.load import Checkpoint
from act_export.onnx_file.inspect import inspect_file
from act_export.onnx_file.precision import BITS
from act_export.progress import Notice
from act_export.runtime import Session
from act_export.runtime.session import placement_of
from act_export.verify.parity.bfloat16_on_cpu import runnable_on_cpu
from act_export.verify.parity.dequantized import dequantized
from act_export.verify.parity.parity_report import CaseResult, ParityReport
from act_export.verify.parity.sessions import verify_sessions

_BFLOAT16_ON_CPU = (
    "ONNX Runtime has no bfloat16 kernels for a CPU: standard operators computed in float32 and their results were "
    "rounded, the attention ran in bfloat16. --device cuda compares with the kernels that a GPU runs"
)


def verify_file(
    path: Path,
    checkpoint: Checkpoint,
    calibrations: CalibrationSet | Calibration | None,
    *,
    device: str = "cpu",
    progress: Notice = lambda _: None,
) -> ParityReport:
    """Parity of a file, with the native library and with the portable functions, against PyTorch.

    Args:
        path: The ONNX file.
        checkpoint: The model that it was exported from, in float32. A file with quantized weights is compared with a
            copy that has the file's weights, dequantized.
        calibrations: That it should have; None for a plain export.
        device: "cpu", "cuda" or "cuda:N".
        progress: Called with what is being compared.

    Raises:
        ActExportError: If the file or the device can't be used, or PyTorch itself fails in the file's type.
    """
    found = inspect_file(path)
    precision, rounding = found.precision, None
    if precision in BITS:
        progress("dequantizing the file's weights")
        quantized = dequantized(path, checkpoint)
        checkpoint, precision, rounding = quantized.checkpoint, quantized.precision, quantized.rounding
    with ExitStack() as stack:
        stands_in = precision == "bfloat16" and device == "cpu"
        file = stack.enter_context(runnable_on_cpu(path)) if stands_in else path
        report = verify_sessions(
            checkpoint,
            calibrations,
            {
                "native library": lambda: Session.open(file, native=True, device=device),
                "portable functions": lambda: Session.open(file, native=False, device=device),
            },
            precision=precision,
            rounding=rounding,
            pads_left=found.pads_left,
            takes_embeddings=found.takes_embeddings,
            device=device,
            progress=progress,
        )
    if device != "cpu":
        progress("where nodes run")
        return replace(report, placement=placement_of(path, native=True, device=device))
    return replace(report, remark=_BFLOAT16_ON_CPU) if stands_in else report


def describe_failures(report: ParityReport) -> str:
    """The failed rows of a report, a line each."""
    lines = []
    if not report.hook_passed:
        lines.append(f"  reference hook against the model's own attention: {report.hook.max_difference:.2e}")
    if report.placement is not None and not report.runs_on_device:
        lines.append(f"  not all attention runs on {report.placement.device}: {report.placement.describe()}")
    for engine in report.engines:
        if not engine.passed and all(result.passed for result in engine.results):
            lines.append(f"  {engine.engine}: a sink flipped in {engine.flipped:.0%} of sequences")
        for result in engine.results:
            if not result.passed:
                lines.append(
                    f"  {engine.engine}, {result.case}: largest difference {result.metrics.max_difference:.2e}, mean "
                    f"{result.metrics.mean_difference:.2e}{_times(report, result)}, same "
                    f"argmax {result.metrics.argmax_agreement:.1%}, {result.wrong_sinks} wrong sinks, sink scores "
                    f"off by {result.score_difference:.1e} at the most, greedy tokens "
                    f"{'differ' if result.greedy_identical is False else 'agree'}"
                )
    return "\n".join(lines)


def _times(report: ParityReport, result: CaseResult) -> str:
    """A case's mean error by that of PyTorch in the same half type; nothing in float32."""
    if report.pytorch is None:
        return ""
    own = {each.case: each.metrics.mean_difference for each in report.pytorch.results}
    limit = max(own.get(result.case, 0.0), report.pytorch.of_all_cases.mean_difference)
    return f" ({result.metrics.mean_difference / max(limit, 1e-30):.1f} times that of {report.pytorch.engine})"
