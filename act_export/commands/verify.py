"""act-export verify: compares a file with PyTorch."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
import typer.core
from rich import box
from rich.text import Text

from act_export.commands.console import (
    console,
    note,
    status,
)
from act_export.commands.loading import check_device, check_model, load_model
from act_export.commands.options import (
    DeviceOption,
    FileArgument,
    JsonOption,
    RevisionOption,
    TrustOption,
)
from act_export.commands.printing import PlainTable, printable
from act_export.errors import ActExportError, VerificationError

if TYPE_CHECKING:
    from act_export.verify.parity.metrics import Metrics
    from act_export.verify.parity.parity_report import EngineReport, ParityReport


def verify_command(
    file: FileArgument,
    against: Annotated[str, typer.Option(metavar="MODEL", help="The checkpoint that it was exported from.")],
    device: DeviceOption = None,
    as_json: JsonOption = False,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Compares an exported model with PyTorch running the reference."""
    from act_export.onnx_file.inspect import inspect_file

    found = inspect_file(file)
    check_model(against, revision=revision, trust_remote_code=trust_remote_code)
    check_device(device)
    checkpoint = load_model(against, revision=revision, trust_remote_code=trust_remote_code)
    if found.identity.differences(checkpoint.identity):
        raise ActExportError(
            f"{file} was exported from another model: {found.identity}, and {against} is {checkpoint.identity}"
        )
    from act_export.verify.parity.job import describe_failures, verify_file

    with status() as step:
        report = verify_file(found.path, checkpoint, found.calibrations, device=device or "cpu", progress=step)
    if as_json:
        print(json.dumps(asdict(report), indent=2))
    else:
        console.print(_parity_table(report))
        if report.remark:
            note(report.remark)
        if report.placement is not None:
            note(report.placement.describe())
        for engine in report.engines:
            print(f"{describe_engine(engine)}, {report.precision}")
    if not report.passed:
        raise VerificationError(f"{file} disagrees with PyTorch\n{describe_failures(report)}")


def describe_engine(engine: EngineReport) -> str:
    """Whether an engine passed, by how much it differs, and how much is allowed."""
    allowed = "" if engine.tolerance is None else f" ({engine.tolerance:.1e} is allowed)"
    return (
        f"{_verdict(engine.passed)}: {engine.engine} within {engine.max_difference:.1e} of PyTorch{allowed} in "
        f"{len(engine.results)} cases"
    )


def _verdict(passed: bool) -> str:
    return "PASS" if passed else "FAIL"


def _parity_table(report: ParityReport) -> PlainTable:
    from act_export.verify.parity.metrics import GATES

    title = Text(printable(f"parity with PyTorch, {report.precision}", lines=False), style="italic")
    table = PlainTable(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("case", "max diff", "allowed", "mean diff", "argmax", "flips", ""):
        table.add_column(column, justify="left" if column == "case" else "right", overflow="fold")

    def add(case: str, metrics: Metrics, tolerance: float | None, flips: str, verdict: str) -> None:
        table.add_row(
            f"  {case}",
            f"{metrics.max_difference:.1e}",
            f"{tolerance:.0e}" if tolerance is not None else "",
            f"{metrics.mean_difference:.1e}",
            f"{metrics.argmax_agreement:.1%}",
            flips,
            verdict,
        )

    table.add_row("reference hook")
    add(
        "against the model's own attention",
        report.hook,
        GATES["float32"].max_difference,
        "",
        _verdict(report.hook_passed),
    )
    for engine in ([report.pytorch] if report.pytorch is not None else []) + list(report.engines):
        table.add_row(engine.engine)
        for result in engine.results:
            verdict = "" if engine is report.pytorch else _verdict(result.passed)
            add(result.case, result.metrics, result.tolerance, str(result.flips), verdict)
    return table
