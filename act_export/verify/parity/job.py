"""Parity of a file against PyTorch."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from act_export.calibration.calibration_set import CalibrationSet
from act_export.calibration.file import Calibration
from act_export.checkpoint.load import Checkpoint
from act_export.checkpoint.streamed.decide import available_bytes
from act_export.onnx_file.inspect import inspect_file
from act_export.onnx_file.precision import BITS
from act_export.progress import Notice
from act_export.runtime import Session
from act_export.runtime.session import placement_of
from act_export.verify.parity.bfloat16_on_cpu import runnable_on_cpu
from act_export.verify.parity.dequantized import dequantized
from act_export.verify.parity.half_model import half_model
from act_export.verify.parity.metrics import EXACT, GATES
from act_export.verify.parity.parity_report import CaseResult, ParityReport
from act_export.verify.parity.sessions import verify_sessions

_FLOAT64_COPY = 2.5  # times the weights in float32: twice these, and what a prompt needs
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

    Where nothing but a float32 file's logits differs by more than is allowed, and there is memory for the model in
    float64, both are held against that: PyTorch in float32 shows what rounding costs this model.

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
        compare = partial(
            verify_sessions,
            calibrations=calibrations,
            openers={
                "native library": lambda: Session.open(file, native=True, device=device),
                "portable functions": lambda: Session.open(file, native=False, device=device),
            },
            pads_left=found.pads_left,
            takes_embeddings=found.takes_embeddings,
            device=device,
            progress=progress,
        )
        report = compare(checkpoint, precision=precision, rounding=rounding)
        if precision == "float32" and _may_be_rounding(report) and _has_room(checkpoint):
            progress("verifying once more, against PyTorch in float64")
            exact = replace(checkpoint, model=half_model(checkpoint.model, "float64"))
            report = compare(exact, precision=EXACT, rounding=lambda _: checkpoint.model)
    if device != "cpu":
        progress("where nodes run")
        return replace(report, placement=placement_of(path, native=True, device=device))
    return replace(report, remark=_BFLOAT16_ON_CPU) if stands_in else report


def _may_be_rounding(report: ParityReport) -> bool:
    """Whether it failed by how much logits differ alone: the same sinks, and the same most likely tokens."""
    least = GATES["float32"].argmax_agreement
    failed = [result for engine in report.engines for result in engine.results if not result.passed]
    same = all(not r.wrong_sinks and r.greedy_identical is not False for r in failed)
    metrics = [*([] if report.hook_passed else [report.hook]), *[result.metrics for result in failed]]
    return bool(metrics) and same and all(each.argmax_agreement >= least for each in metrics)


def _has_room(checkpoint: Checkpoint) -> bool:
    """For a copy in float64."""
    free = available_bytes()
    return free is None or _FLOAT64_COPY * sum(each.nbytes for each in checkpoint.model.parameters()) < free


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
