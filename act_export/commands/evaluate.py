"""act-export eval and lm-eval: what a file's answers are worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from act_export.commands import options
from act_export.commands.console import progress_bar
from act_export.errors import ActExportError


def eval_command(
    file: options.FileArgument,
    against: Annotated[
        Path | None,
        typer.Option(metavar="OTHER.onnx", help="Another file of the model to compare with."),
    ] = None,
    task: options.TasksOption = None,
    data: options.DataFilesOption = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|plain|FILE",
            help="One of the file's calibrations, instead of its default, or a calibration file; with --chat-file also "
            "an adapter, and repeatable.",
        ),
    ] = None,
    chat_file: Annotated[
        Path | None,
        typer.Option(metavar="QUESTIONS.jsonl", help="Conversations instead of tasks: MT-Bench's question.jsonl."),
    ] = None,
    chat_out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Of --chat-file: answers as FastChat has them, and a page.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Of --chat-file: tokens of an answer at the most, 1024.")
    ] = None,
    split: Annotated[
        str, typer.Option(metavar="report|held-out|all", help="The search's report split, all it left out, or all.")
    ] = "report",
    seed: Annotated[
        int | None,
        typer.Option(
            help="Of splits and shots; for splits the file's own search has the say where there was one. With "
            "--chat-file of the order on the page."
        ),
    ] = None,
    scoring: options.ScoringOption = None,
    shots: options.ShotsOption = 0,
    chat: options.ChatOption = False,
    truncate: options.TruncateOption = False,
    limit: Annotated[int | None, typer.Option(help="Questions of each task, or of --chat-file, at the most.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens that run together at the most.")] = None,
    portable: options.PortableOption = False,
    device: options.DeviceOption = None,
    tokenizer: options.TokenizerOption = None,
    trust_remote_code: options.TrustOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Measures accuracy through ONNX Runtime, calibrated against the same file plain, or against another."""
    common: dict[str, Any] = {
        "file": file,
        "limit": limit,
        "batch_tokens": batch_tokens,
        "portable": portable,
        "device": device or "cpu",
        "tokenizer": tokenizer,
        "trust_remote_code": trust_remote_code,
    }
    if tokenizer is not None:
        from act_export.checkpoint.fetch import check_source

        check_source(tokenizer, trust_remote_code=trust_remote_code, weights=False)
    if chat_file is not None:
        others = {"--against": against, "--task": task, "--data": data, "--scoring": scoring, "--shots": shots}
        _refuse(
            {**others, "--split": split != "report", "--truncate": truncate}, "is of tasks, and --chat-file isn't one"
        )
        more = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
        _eval_chats(
            {**common, **more, "questions": chat_file, "out": chat_out, "calibrations": tuple(calibration or ())},
            seed or 0,
            as_json=as_json,
        )
        return
    _refuse({"--chat-out": chat_out, "--max-new-tokens": max_new_tokens}, "is of --chat-file, which isn't given")
    if calibration is not None and len(calibration) > 1:
        raise ActExportError(
            f"--calibration is given {len(calibration)} times, and tasks are answered with one: "
            f"{', '.join(calibration)}; name one"
        )
    from act_export.verify.evaluate.job import evaluate_files
    from act_export.verify.evaluate.request import EvaluationRequest

    request = EvaluationRequest(
        **common,
        against=against,
        calibration=calibration[0] if calibration else None,
        questions=options.questions_of(
            task, data, scoring=scoring, shots=shots, chat=chat, truncate=truncate, seed=seed
        ),
        split=split,
    )
    with progress_bar("eval") as progress:
        report = evaluate_files(request, progress=progress)
    from act_export.commands.evaluate_table import print_evaluation_report, report_json

    if as_json:
        print(report_json(report))
    else:
        print_evaluation_report(report)


def _refuse(given: dict[str, object], reason: str) -> None:
    """Raises ActExportError for the first option that has a value."""
    option = next((option for option, value in given.items() if value), None)
    if option is not None:
        raise ActExportError(f"{option} {reason}; leave one of them out")


def _eval_chats(request: dict[str, Any], seed: int, *, as_json: bool) -> None:
    from act_export.commands.chat_table import chat_json, print_chat_report
    from act_export.verify.evaluate.chat.job import ChatRequest, evaluate_chats

    with progress_bar("chat") as progress:
        report = evaluate_chats(ChatRequest(**request, seed=seed), progress=progress)
    if as_json:
        print(chat_json(report))
    else:
        print_chat_report(report)


def lm_eval_command(context: typer.Context) -> None:
    """Runs lm-evaluation-harness with the model type act-onnx; all options are its own."""
    from act_export.verify.evaluate.harness import run_harness

    run_harness(context.args)
