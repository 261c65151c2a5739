"""act-export adapter: another calibration for a model that is deployed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from act_export.commands.console import note
from act_export.commands.options import BetaOption, FileArgument, ThresholdOption
from act_export.errors import ActExportError
from act_export.files import write_whole

_NUMBERS = ".bin"


def adapter_command(
    file: FileArgument,
    calibration: Annotated[
        str | None, typer.Option(metavar="FILE|NAME|plain", help="Calibration file, shipped recipe, or plain.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to: X.onnx_adapter, or X.bin for programs that bind the numbers.")
    ] = None,
    beta: BetaOption = None,
    threshold: ThresholdOption = None,
) -> None:
    """Writes a calibration as an adapter of an exported model, which ONNX Runtime applies per request.

    X.bin has the same numbers by themselves, float32: beta, gamma and threshold of each head.
    """
    from act_export.calibration.recipes import describe_calibration, is_measured_on, named_calibration
    from act_export.calibration.strengths import PLAIN
    from act_export.onnx_file.load import load_without_weights, properties_of
    from act_export.onnx_file.names import model_file
    from act_export.onnx_file.record import FileRecord
    from act_export.runtime.adapter import SUFFIX, model_version, write_adapter

    if calibration is None or out is None:
        raise ActExportError(
            f"--calibration or --out is missing: act-export adapter {file} --calibration FILE --out NAME{SUFFIX}"
        )
    if out.suffix not in (SUFFIX, _NUMBERS):
        raise ActExportError(f"--out is {out}; its name must end in {SUFFIX} or {_NUMBERS}")
    path = model_file(file)
    if not path.is_file():
        raise ActExportError(f"there is no model {path}")
    record = FileRecord.read(properties_of(load_without_weights(path), path), str(path))
    if record.calibrations is None or not len(record.calibrations.heads):
        raise ActExportError(
            f"no head of {path} can be calibrated; export the model with a calibration, or with --switchable"
        )
    chosen = None
    if calibration != PLAIN:
        chosen = named_calibration(calibration).with_overrides(beta=beta, threshold=threshold)
        if record.model is not None:
            chosen.check_fits(record.model)
    strengths = record.calibrations.heads.strengths(chosen)
    if out.suffix == SUFFIX:
        write_adapter(out, strengths, model_version(record))
    else:
        write_whole(out, strengths.astype("<f4").tobytes())
    if chosen is None:
        note("calibration: none (plain)")
    else:
        measured = is_measured_on(chosen, record.model, record.dtype)
        note(f"calibration: {describe_calibration(chosen, measured=measured)}")
    note(f"{out.stat().st_size} bytes, for {path} and other files of this model with the same calibrated heads")
    print(out)
