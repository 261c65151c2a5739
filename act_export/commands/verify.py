"""act-export verify: compares a file with PyTorch."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
import typer.core
from rich.text import Text

from act_export.commands.console import (
    console,
    note,
    status,
)
from act_export.commands.loading import check_device, load_model
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
    from act_export.verify.parity.parity_report import ParityReport


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
    from act_export.verify.parity.job import describe_failures, verify_file

    found = inspect_file(file)
    check_device(device)
    checkpoint = load_model(against, revision=revision, trust_remote_code=trust_remote_code)
    if found.identity.differences(checkpoint.identity):
        raise ActExportError(
            f"{file} was exported from another model: {found.identity}, and {against} is {checkpoint.identity}"
        )
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
    if not report.passed:
        raise VerificationError(f"{file} disagrees with PyTorch\n{describe_failures(report)}")


def _parity_table(report: ParityReport) -> PlainTable:
    table = PlainTable(title=Text(printable(f"parity with PyTorch, {report.precision}", lines=False), style="italic"))
    for column in ("engine", "case", "positions", "max diff", "mean diff", "argmax", "top 10", "flips", "passed"):
        table.add_column(column, justify="left" if column in ("engine", "case") else "right")
    hook = report.hook
    table.add_row(
        "reference hook",
        "against the model's own attention",
        str(hook.positions),
        f"{hook.max_difference:.1e}",
        f"{hook.mean_difference:.1e}",
        f"{hook.argmax_agreement:.1%}",
        f"{hook.top10_agreement:.1%}",
        "",
        "yes" if report.hook_passed else "NO",
    )
    for engine in ([report.pytorch] if report.pytorch is not None else []) + list(report.engines):
        for result in engine.results:
            metrics = result.metrics
            table.add_row(
                engine.engine,
                result.case,
                str(metrics.positions),
                f"{metrics.max_difference:.1e}",
                f"{metrics.mean_difference:.1e}",
                f"{metrics.argmax_agreement:.1%}",
                f"{metrics.top10_agreement:.1%}",
                str(result.flips),
                "" if engine is report.pytorch else "yes" if result.passed else "NO",
            )
    return table
