"""act-export try: whether calibration is worth it for a model, on a user's own questions."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from act_export.commands import options
from act_export.commands.console import note, progress_bar
from act_export.commands.loading import AskedModel
from act_export.commands.trial_table import print_trial, trial_json


def try_command(
    model: options.ModelArgument,
    data: options.DataOption = None,
    task: options.TaskOption = None,
    out: Annotated[Path, typer.Option(help="The calibration file to write where one is found.")] = Path(
        "calibration.json"
    ),
    scoring: options.ScoringOption = None,
    shots: options.ShotsOption = 0,
    chat: options.ChatOption = False,
    truncate: options.TruncateOption = False,
    seed: options.SeedOption = 0,
    searches: Annotated[
        int, typer.Option(help="Searches, each measured on questions of its own: more use few rows better.")
    ] = 3,
    costs: Annotated[
        bool, typer.Option("--costs/--no-costs", help="Measure what the calibration costs on other tasks.")
    ] = True,
    batch_tokens: options.BatchTokensOption = None,
    dtype: options.DtypeOption = "float32",
    device: options.DeviceOption = None,
    device_map: options.DeviceMapOption = None,
    revision: options.RevisionOption = None,
    trust_remote_code: options.TrustOption = False,
    json: options.JsonOption = False,
) -> None:
    """Go or no-go: does calibration help this model on your questions, and would a cheaper remedy do?

    Nothing is exported. Interrupted, the same command goes on where it stopped.
    """
    from act_export.errors import ActExportError
    from act_export.files import check_replaceable, write_whole
    from act_export.search.request import BATCH_TOKENS, SearchOptions
    from act_export.search.trial_data import trial_data

    asked = options.questions_of(
        [task] if task else None,
        [data] if data else None,
        scoring=scoring,
        shots=shots,
        chat=chat,
        truncate=truncate,
        seed=seed,
        default=False,
    )
    questions = trial_data(asked, searches=searches)
    if out.is_dir():
        raise ActExportError(f"{out} is a folder; pass a file, e.g. --out {out / 'calibration.json'}")
    check_replaceable(out)
    asked_model = AskedModel(model, dtype, device, device_map, revision, trust_remote_code)
    asked_model.check()
    how = SearchOptions(
        batch_tokens=BATCH_TOKENS if batch_tokens is None else batch_tokens,
        precision="auto" if dtype == "float32" else "own",
    )
    say = note if json else print
    few = f"; {questions.recommended} are recommended" if questions.different < questions.recommended else ""
    say(
        f"{questions.name}: {questions.different} different questions, {questions.reported} of them to report on, in "
        f"{searches} searches{few}. Gains below about {100 * questions.detectable:.0f} points can't be told from luck."
    )
    checkpoint = asked_model.load()
    from act_export.attention.hook import check_supported
    from act_export.search.trial import elsewhere, run_trial

    check_supported(checkpoint.model)
    with progress_bar("search") as progress:
        trial = run_trial(checkpoint, questions, how, progress=progress)
    found = trial.calibration
    cost = None
    if found is not None:
        write_whole(out, found.to_json())
        if costs and trial.verdict != "plain":
            with progress_bar("costs") as progress:
                cost = elsewhere(checkpoint, found, without=task or "", progress=progress)
    if json:
        print(trial_json(questions, trial, cost))
    else:
        source = f"--data {shlex.quote(str(data))}" if data else f"--task {shlex.quote(task or '')}"
        print_trial(questions, trial, cost, model=shlex.quote(model), source=source, file=shlex.quote(str(out)))
