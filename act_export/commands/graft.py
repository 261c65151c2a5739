"""The command that calibrates models which were exported before: graft."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from act_export.commands.console import note, status
from act_export.commands.options import (
    BetaOption,
    CalibrationsOption,
    DefaultOption,
    ModeOption,
    SwitchableOption,
    ThresholdOption,
)
from act_export.errors import ActExportError

if TYPE_CHECKING:
    from act_export.graft import Grafted


def graft_command(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="IN", help="An ONNX file, or a folder of onnxruntime-genai's builder, Olive, optimum or act-export."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Where to: a name ending in .onnx for a file, a folder for a folder.")
    ] = None,
    calibration: CalibrationsOption = None,
    default: DefaultOption = None,
    switchable: SwitchableOption = False,
    beta: BetaOption = None,
    threshold: ThresholdOption = None,
    threshold_mode: ModeOption = None,
    portable: Annotated[
        bool,
        typer.Option("--portable", help="For onnxruntime-genai: without the native library, slower."),
    ] = False,
    state_in_cache: Annotated[
        bool, typer.Option("--state-in-cache", help="Sink state as part of the cache, for hosts such as optimum.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Compare each rewritten layer with what was there.")
    ] = True,
    copy_weights: Annotated[
        bool, typer.Option("--copy-weights", help="Give a file weights of its own, rather than those beside IN.")
    ] = False,
    remove: Annotated[bool, typer.Option("--remove", help="Take a graft out of IN again.")] = False,
) -> None:
    """Calibrates a model that was exported before, at any precision; --remove undoes it.

    The attention of the calibrated layers is replaced; every other node, name and weight stays. A folder for
    onnxruntime-genai stays one.
    """
    from act_export.calibration.recipes import named_calibrations

    if out is None:
        heads = "--remove" if remove else f"--calibration {' --calibration '.join(calibration or ['FILE'])}"
        raise ActExportError(f"--out is missing: act-export graft {file} {heads} --out NEW")
    if not file.exists():
        raise ActExportError(f"there is no model {file}: name an ONNX file, or a folder that has model.onnx")
    if remove:
        values = {
            "--calibration": calibration,
            "--default": default,
            "--switchable": switchable or None,
            "--beta": beta,
            "--threshold": threshold,
            "--threshold-mode": threshold_mode,
            "--copy-weights": copy_weights or None,
        }
        given = [name for name, value in values.items() if value is not None]
        if given:
            raise ActExportError(f"--remove takes the calibration out; leave out {' and '.join(given)}")
        from act_export.graft.job import remove_graft

        with status() as step:
            removed = remove_graft(file, out, progress=step)
        note(f"taken out of {len(removed.layers)} layers; the graph is what it was before")
        print(removed.path)
        return
    if not calibration and not switchable:
        raise ActExportError(
            f"--calibration is missing: act-export graft {file} --calibration FILE --out {out}, a file or a recipe's "
            f"name; act-export search CHECKPOINT finds heads"
        )
    chosen = {
        name: each.with_overrides(beta=beta, threshold=threshold, threshold_mode=threshold_mode)
        for name, each in named_calibrations(calibration or []).items()
    }
    from act_export.graft.job import graft
    from act_export.graft.sink_state import StateLayout

    with status() as step:
        layout = StateLayout.PACKED if state_in_cache else None
        written = graft(
            file,
            chosen,
            out,
            default=default,
            switchable=switchable,
            layout=layout,
            native=not portable,
            check=check,
            copy_weights=copy_weights,
            progress=step,
        )
    _summarize(written)


def _summarize(written: Grafted) -> None:
    from act_export.calibration.recipes import describe_calibrations
    from act_export.onnx_file.inspect import inspect_file

    found = inspect_file(written.path)
    for line in describe_calibrations(written.calibrations, found.identity, found.precision):
        note(line)
    replaced = ", ".join(f"{count} {kind}" for kind, count in written.patterns.items())
    note(f"replaced in {len(written.layers)} of {written.num_layers} layers: {replaced}")
    if written.difference is not None:
        note(f"each of them with beta = 1 within {written.difference:.1e} of what was there")
    note(f"sink state: in {'inputs of its own' if written.layout.value == 'scores' else 'further layers of the cache'}")
    for line in written.notes:
        note(line)
    for file, size in written.files.items():
        note(f"{size / 1e6:9.1f} MB  {file}")
    if others := [file.name for file in written.files if not file.name.startswith(written.path.name)]:
        note(
            f"{written.path.name} needs {', '.join(others)} beside it; --copy-weights gives it weights under a name of "
            f"its own"
        )
    print(written.path)
