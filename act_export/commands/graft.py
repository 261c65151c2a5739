"""The command that calibrates models which were exported before: graft."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from act_export.calibration.recipes import describe_calibration, named_calibration
from act_export.commands.console import note, status
from act_export.commands.options import BetaOption, ModeOption, ThresholdOption
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
    calibration: Annotated[
        str | None, typer.Option(metavar="FILE|NAME", help="Calibration file or shipped recipe.")
    ] = None,
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
    remove: Annotated[bool, typer.Option("--remove", help="Take a graft out of IN again.")] = False,
) -> None:
    """Calibrates a model that was exported before, at any precision; --remove undoes it.

    The attention of the calibrated layers is replaced; every other node, name and weight stays. A folder for
    onnxruntime-genai stays one.
    """
    from act_export.graft import StateLayout, remove_graft
    from act_export.graft.job import graft

    if out is None:
        heads = "--remove" if remove else f"--calibration {calibration or 'FILE'}"
        raise ActExportError(f"--out is missing: act-export graft {file} {heads} --out NEW")
    if remove:
        values = {
            "--calibration": calibration,
            "--beta": beta,
            "--threshold": threshold,
            "--threshold-mode": threshold_mode,
        }
        given = [name for name, value in values.items() if value is not None]
        if given:
            raise ActExportError(f"--remove takes the calibration out; leave out {' and '.join(given)}")
        with status() as step:
            removed = remove_graft(file, out, progress=step)
        note(f"taken out of {len(removed.layers)} layers; the graph is what it was before")
        print(removed.path)
        return
    if calibration is None:
        raise ActExportError(
            f"--calibration is missing: act-export graft {file} --calibration FILE --out {out}, a file or a recipe's "
            f"name; act-export search CHECKPOINT finds heads"
        )
    chosen = named_calibration(calibration).with_overrides(
        beta=beta, threshold=threshold, threshold_mode=threshold_mode
    )
    with status() as step:
        layout = StateLayout.PACKED if state_in_cache else None
        written = graft(file, chosen, out, layout=layout, native=not portable, check=check, progress=step)
    _summarize(written)


def _summarize(written: Grafted) -> None:
    note(f"calibration: {describe_calibration(written.calibration)}")
    replaced = ", ".join(f"{count} {kind}" for kind, count in written.patterns.items())
    note(f"replaced in {len(written.layers)} of {written.num_layers} layers: {replaced}")
    if written.difference is not None:
        note(f"each of them with beta = 1 within {written.difference:.1e} of what was there")
    note(f"sink state: in {'inputs of its own' if written.layout.value == 'scores' else 'further layers of the cache'}")
    for line in written.notes:
        note(line)
    print(written.path)
