"""act-export verify: compares a file with PyTorch."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
import typer.core

from act_export.commands.console import (
    console,
    note,
    status,
)
from act_export.commands.loading import AskedModel, check_device
from act_export.commands.options import (
    DeviceOption,
    FileArgument,
    JsonOption,
    RevisionOption,
    TrustOption,
)
from act_export.commands.parity_table import describe_engine, parity_table
from act_export.errors import ActExportError, VerificationError


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
    asked_model = AskedModel(against, revision=revision, trust_remote_code=trust_remote_code)
    asked_model.check()
    check_device(device)
    checkpoint = asked_model.load()
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
        console.print(parity_table(report))
        if report.remark:
            note(report.remark)
        if report.placement is not None:
            note(report.placement.describe())
        for engine in report.engines:
            print(f"{describe_engine(engine)}, {report.precision}")
    if not report.passed:
        raise VerificationError(f"{file} disagrees with PyTorch\n{describe_failures(report)}")
