"""act-export search: finds the heads to calibrate."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
import typer.core

from act_export.commands import options
from act_export.commands.console import note, progress_bar
from act_export.commands.loading import AskedModel
from act_export.commands.search_table import print_search_result
from act_export.errors import ActExportError


def search_command(
    model: options.ModelArgument,
    out: Annotated[Path | None, typer.Option(help="The calibration file to write; for several tasks a folder.")] = None,
    task: options.TasksOption = None,
    data: options.DataFilesOption = None,
    scoring: options.ScoringOption = None,
    shots: options.ShotsOption = 0,
    chat: options.ChatOption = False,
    truncate: options.TruncateOption = False,
    method: Annotated[
        str | None, typer.Option(metavar="act|gamma|fit", help="What to try, several by comma; else act and fit.")
    ] = None,
    goal: Annotated[
        str,
        typer.Option(
            metavar="accuracy|beyond-remedy",
            help="Of the model as it is, or what it adds where your program puts an offset on each answer.",
        ),
    ] = "accuracy",
    ranking: Annotated[
        str, typer.Option(metavar="gradient|gradient+confirm|exhaustive", help="How act ranks heads.")
    ] = "gradient",
    beta: Annotated[str | None, typer.Option(metavar="B,...", help="For act: scales of later sinks to try.")] = None,
    gamma: Annotated[str | None, typer.Option(metavar="G,...", help="For gamma: scales to try, each or 1/G.")] = None,
    threshold: Annotated[str | None, typer.Option(metavar="T,...", help="Sink score thresholds to try.")] = None,
    threshold_mode: Annotated[
        str | None, typer.Option(metavar="absolute|relative", help="Or both, by comma, each with its thresholds.")
    ] = None,
    heads: Annotated[str | None, typer.Option(metavar="N,...", help="Numbers of heads to try.")] = None,
    fit_steps: Annotated[str | None, typer.Option(metavar="N,...", help="For fit: gradient steps to try.")] = None,
    fit_l2: Annotated[str | None, typer.Option(metavar="X,...", help="For fit: pulls towards 1 to try.")] = None,
    fit_l1: Annotated[
        float,
        typer.Option(metavar="X", help="For fit: strengths of smaller derivatives stay at 1, 0 to 1."),
    ] = 0.0,
    confirm: Annotated[int, typer.Option(help="Heads that gradient+confirm measures exactly.")] = 40,
    rank: Annotated[int | None, typer.Option(help="Questions to rank heads with, of each task.")] = None,
    choose: Annotated[int | None, typer.Option(help="Questions to choose with.")] = None,
    report: Annotated[int | None, typer.Option(help="Questions to report the gain on.")] = None,
    seed: options.SeedOption = 0,
    joint: Annotated[bool, typer.Option("--joint/--no-joint", help="Several tasks: also one set for all.")] = True,
    random_draws: Annotated[int, typer.Option(help="Random head sets to compare with.")] = 1,
    batch_tokens: options.BatchTokensOption = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory for ranking, a third more time.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="float32|bfloat16|float16|auto",
            help="Of the model; else float32, with the search in bfloat16 where the processor is fast at that.",
        ),
    ] = None,
    weights: options.WeightsOption = None,
    device: options.DeviceOption = None,
    device_map: options.DeviceMapOption = None,
    journal: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where finished work is kept, if not in the cache folder.")
    ] = None,
    revision: options.RevisionOption = None,
    trust_remote_code: options.TrustOption = False,
) -> None:
    """Finds the heads to calibrate: writes a calibration file with the accuracy that shows it.

    Interrupted or killed, the same command goes on where it stopped. Under torchrun the processes share the work.
    """
    from act_export.calibration.recipes import describe_calibration
    from act_export.onnx_file.names import model_file
    from act_export.search.job import SearchJob, check_output, run_search, save_result
    from act_export.search.request import BATCH_TOKENS, HEAD_COUNTS, SearchOptions, thresholds_of

    given: dict[str, dict[str, object]] = {
        "act": {"--beta": beta, "--heads": heads},
        "gamma": {"--gamma": gamma},
        "fit": {"--fit-steps": fit_steps, "--fit-l2": fit_l2, "--fit-l1": fit_l1 or None},
    }
    how = SearchOptions(
        methods=options.methods_of(method, given, SearchOptions().methods),
        ranking=ranking,
        betas=options.numbers_of("--beta", beta) or SearchOptions().betas,
        gammas=options.numbers_of("--gamma", gamma) or SearchOptions().gammas,
        thresholds=thresholds_of(options.numbers_of("--threshold", threshold), threshold_mode),
        head_counts=tuple(map(int, options.numbers_of("--heads", heads, whole=True))) or HEAD_COUNTS,
        fit_steps=tuple(map(int, options.numbers_of("--fit-steps", fit_steps, whole=True)))
        or SearchOptions().fit_steps,
        fit_l2=options.numbers_of("--fit-l2", fit_l2) or SearchOptions().fit_l2,
        fit_l1=fit_l1,
        confirm=confirm,
        batch_tokens=BATCH_TOKENS if batch_tokens is None else batch_tokens,
        gradient_checkpointing=gradient_checkpointing,
        random_draws=random_draws,
        goal=goal,
        precision="auto" if dtype is None and weights is None else "own",
    )
    job = SearchJob(
        options.questions_of(task, data, scoring=scoring, shots=shots, chat=chat, truncate=truncate, seed=seed),
        rank=rank,
        choose=choose,
        report=report,
        options=how,
        joint=joint,
        journal=journal,
    )
    several = len(job.questions.sources) > 1
    target = out or Path("calibrations" if several else "calibration.json")
    check_output(target, job)
    asked_model = AskedModel(model, dtype or "float32", device, device_map, revision, trust_remote_code)
    asked_model.check()
    if weights is not None and not model_file(weights).is_file():
        raise ActExportError(f"there is no model {model_file(weights)}; pass a file of --dtype int4 or int8")
    tasks = job.load()
    from act_export.attention.hook import check_supported
    from act_export.search.processes import own_device, process_group, process_index
    from act_export.verify.parity.dequantized import check_quantized, dequantized

    if weights is not None:
        check_quantized(model_file(weights))
    with process_group():
        checkpoint = replace(asked_model, device=own_device(device, device_map)).load()
        check_supported(checkpoint.model)
        if weights is not None:
            checkpoint = dequantized(model_file(weights), checkpoint).checkpoint
        first = process_index() == 0
        started = time.monotonic()
        with progress_bar("search") as progress:
            result = run_search(checkpoint, job, tasks=tasks, progress=progress if first else None)
        if not first:
            return
        note(f"searched in {time.monotonic() - started:.1f} s")
        computed, known = result.units
        if computed < known:
            note(f"{known - computed} of {known} steps were found in the journal or came from other processes")
        if result.damaged:
            note(f"{result.damaged} lines of the journal were damaged; what they had was computed again")
        files = save_result(result, target)
        print_search_result(result)
        for name, calibration in result.calibrations.items():
            if calibration.heads:
                note(f"{name}: {describe_calibration(calibration, measured=True)}")
            else:
                p = result.reports[name].p
                note(f"{name}: no head is calibrated: nothing tried gained more than luck explains (p = {p:.2g})")
        for file in files:
            print(file)
