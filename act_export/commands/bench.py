"""act-export bench: speed and memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
import typer.core

from act_export.commands.console import (
    progress_bar,
)
from act_export.commands.loading import AskedModel
from act_export.commands.options import (
    DeviceOption,
    FileArgument,
    PortableOption,
    RevisionOption,
    TrustOption,
)
from act_export.errors import ActExportError
from act_export.files import check_replaceable, check_writable


def bench_command(
    file: FileArgument,
    against: Annotated[
        list[Path] | None,
        typer.Option(metavar="PLAIN.onnx", help="Another file of the model, also of another exporter; repeatable."),
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|plain|FILE", help="Calibrations of FILE, each in turn, instead of its default; repeatable."
        ),
    ] = None,
    pytorch: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The checkpoint: PyTorch with the same calibration, eager.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Of each sequence.")] = 1024,
    new_tokens: Annotated[int, typer.Option(help="Generated after each prompt.")] = 128,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    threads: Annotated[int | None, typer.Option(help="Of an operator; otherwise what ONNX Runtime chooses.")] = None,
    rounds: Annotated[int, typer.Option(help="Turns of each.")] = 5,
    pytorch_rounds: Annotated[int | None, typer.Option(help="Turns of PyTorch; otherwise as many.")] = None,
    pytorch_tokens: Annotated[int, typer.Option(help="New tokens of PyTorch, which is slow.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the prompt's random tokens.")] = 0,
    portable: PortableOption = False,
    device: DeviceOption = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every measurement there.")
    ] = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Measures speed and memory, beside other files and PyTorch."""
    from act_export.commands.bench_table import print_bench_report
    from act_export.verify.bench.job import bench_file
    from act_export.verify.bench.measurements import BenchRequest

    if json_file is not None:
        check_replaceable(json_file)
        check_writable(json_file.parent, advice="pass another place with --json")
    if revision is not None and pytorch is None:
        raise ActExportError(
            f"--revision {revision} is of --pytorch MODEL, which isn't given; add it, or leave --revision out"
        )
    request = BenchRequest(
        file=file,
        against=tuple(against or ()),
        calibrations=tuple(calibration or ()),
        pytorch=pytorch,
        revision=revision,
        trust_remote_code=trust_remote_code,
        portable=portable,
        device=device or "cpu",
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch=batch,
        threads=threads,
        rounds=rounds,
        pytorch_rounds=pytorch_rounds,
        pytorch_tokens=pytorch_tokens,
        seed=seed,
    )
    from act_export.checkpoint.hub import is_on_hub

    if pytorch is not None:
        asked_model = AskedModel(pytorch, revision=revision, trust_remote_code=trust_remote_code)
        asked_model.check()
        if is_on_hub(pytorch):  # before the processes that are measured, and with a bar
            fetched = asked_model.fetch()
            request = replace(request, pytorch=fetched.name, revision=fetched.revision)
    with progress_bar("bench") as progress:
        report = bench_file(request, progress=progress)
    print_bench_report(report)
    if json_file is not None:
        report.save(json_file)
