"""act-export eval and lm-eval: what a file's answers are worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import typer.core

from act_export.commands import options
from act_export.commands.console import progress_bar


def eval_command(
    file: options.FileArgument,
    against: Annotated[
        Path | None,
        typer.Option(metavar="OTHER.onnx", help="Another file of the model to compare with."),
    ] = None,
    task: options.TasksOption = None,
    data: options.DataFilesOption = None,
    calibration: options.RequestOption = None,
    split: Annotated[
        str, typer.Option(metavar="report|held-out|all", help="The search's report split, all it left out, or all.")
    ] = "report",
    seed: Annotated[
        int | None,
        typer.Option(help="Of splits and shots; for splits the file's own search has the say where there was one."),
    ] = None,
    scoring: options.ScoringOption = None,
    shots: options.ShotsOption = 0,
    chat: options.ChatOption = False,
    truncate: options.TruncateOption = False,
    limit: Annotated[int | None, typer.Option(help="Questions of each task at the most.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens that run together at the most.")] = None,
    portable: options.PortableOption = False,
    device: options.DeviceOption = None,
    tokenizer: options.TokenizerOption = None,
    trust_remote_code: options.TrustOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Measures accuracy through ONNX Runtime, calibrated against the same file plain, or against another."""
    from act_export.commands.evaluate_table import print_evaluation_report, report_json
    from act_export.verify.evaluate.job import evaluate_files
    from act_export.verify.evaluate.results import EvaluationRequest

    request = EvaluationRequest(
        file=file,
        against=against,
        calibration=calibration,
        questions=options.questions_of(
            task, data, scoring=scoring, shots=shots, chat=chat, truncate=truncate, seed=seed
        ),
        split=split,
        limit=limit,
        batch_tokens=batch_tokens,
        portable=portable,
        device=device or "cpu",
        tokenizer=tokenizer,
        trust_remote_code=trust_remote_code,
    )
    with progress_bar("eval") as progress:
        report = evaluate_files(request, progress=progress)
    if as_json:
        print(report_json(report))
    else:
        print_evaluation_report(report)


def lm_eval_command(context: typer.Context) -> None:
    """Runs lm-evaluation-harness with the model type act-onnx; all options are its own."""
    from act_export.verify.evaluate.harness import run_harness

    run_harness(context.args)
