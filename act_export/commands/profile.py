"""The commands that show a model's sinks: profile and report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from act_export.commands import options
from act_export.commands.console import note, progress_bar, status
from act_export.commands.loading import AskedModel
from act_export.errors import ActExportError
from act_export.files import check_replaceable, check_writable

FORMATS = ("html", "png", "svg")


def profile_command(
    model: options.ModelArgument,
    task: options.TasksOption = None,
    data: options.DataFilesOption = None,
    text: Annotated[list[Path] | None, typer.Option("--text", metavar="FILE", help="Plain text; repeatable.")] = None,
    out: Annotated[Path, typer.Option(metavar="FILE.safetensors", help="With FILE.json beside it.")] = Path(
        "profile.safetensors"
    ),
    calibration: Annotated[
        str | None,
        typer.Option(metavar="FILE|NAME", help="Show what it changes; otherwise the model's shipped recipe."),
    ] = None,
    report: Annotated[bool, typer.Option("--report/--no-report", help="Write the page FILE.html too.")] = True,
    effects: Annotated[
        bool, typer.Option("--effects/--no-effects", help="Measure whether each head's sinks help or hurt the answers.")
    ] = True,
    answers: Annotated[
        bool,
        typer.Option("--answers/--no-answers", help="With a calibration, show some answers before and after."),
    ] = True,
    prompts: Annotated[int, typer.Option(help="Of each source at the most.")] = 96,
    length: Annotated[
        int | None,
        typer.Option(help="Tokens of what texts are cut into; 1024, or what the model takes."),
    ] = None,
    absolute_threshold: Annotated[float, typer.Option(help="Sink score above which a token is a sink.")] = 0.1,
    relative_threshold: Annotated[float, typer.Option(help="The same, divided by the prompt's tokens.")] = 5.0,
    scoring: options.ScoringOption = None,
    shots: options.ShotsOption = 0,
    chat: options.ChatOption = False,
    truncate: options.TruncateOption = False,
    seed: options.SeedOption = 0,
    batch_tokens: options.BatchTokensOption = None,
    dtype: options.DtypeOption = "float32",
    device: options.DeviceOption = None,
    device_map: options.DeviceMapOption = None,
    revision: options.RevisionOption = None,
    trust_remote_code: options.TrustOption = False,
) -> None:
    """Finds where the model's attention sinks are: by layer, head, position and token.

    Without --task, --data or --text it takes questions of SST-2.

    Writes FILE.safetensors and FILE.json, and a page that shows them. Interrupted or killed, the same command goes on
    where it stopped.
    """
    from act_export.calibration.recipes import named_calibration
    from act_export.profile.job import ProfileJob, load_prompts, run_profile
    from act_export.profile.report import accuracies_of
    from act_export.profile.report.facts import effect_facts, key_facts
    from act_export.profile.request import BATCH_TOKENS, ProfileOptions
    from act_export.profile.sink_profile import unreachable
    from act_export.search.resolve import calibration_to_show

    job = ProfileJob(
        options.questions_of(
            task,
            data,
            scoring=scoring,
            shots=shots,
            chat=chat,
            truncate=truncate,
            seed=seed,
            default=not text,
        ),
        texts=tuple(text or ()),
        prompts=prompts,
        length=length,
        effects=effects,
        answers=answers,
        options=ProfileOptions(
            absolute_threshold, relative_threshold, BATCH_TOKENS if batch_tokens is None else batch_tokens
        ),
    )
    _check_profile_output(out, report=report)
    asked_model = AskedModel(model, dtype, device, device_map, revision, trust_remote_code)
    asked_model.check()
    given = [named_calibration(calibration)] if calibration is not None else []  # refused before long work
    questions = load_prompts(job)
    if report:
        from act_export.profile.report import write_report  # refused before long work, where it isn't installed
    checkpoint = asked_model.load(fits=given)
    from act_export.attention.hook import check_supported

    check_supported(checkpoint.model)
    shown = calibration_to_show(checkpoint, calibration, note)
    accuracies = accuracies_of(shown) if report and shown is not None else ()  # refused before long work
    for asked in questions:
        if len(asked.examples) < prompts:
            note(f"{asked.name}: {len(asked.examples)} prompts, fewer than --prompts {prompts}")
    with progress_bar("profile") as progress:
        profile = run_profile(checkpoint, job, questions, calibration=shown, out=out, progress=progress)
    for line in unreachable(profile):
        note(f"warning: {line}")
    for line in (*key_facts(profile.overall, "absolute", shown), *effect_facts(profile.overall)):
        note(line)
    print(out)
    print(out.with_suffix(".json"))
    if report:
        page = out.with_suffix(".html")
        with status() as step:
            step(f"writing {page}")
            write_report(profile, page, accuracies=accuracies)
        print(page)


def report_command(
    profile: Annotated[Path, typer.Argument(metavar="PROFILE", help="What act-export profile wrote.")],
    calibration: Annotated[
        str | None,
        typer.Argument(metavar="[CALIBRATION]", help="Calibration file or shipped recipe, to mark its heads."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The page, or for png and svg a folder: report.html, or figures.")
    ] = None,
    figures: Annotated[str, typer.Option("--format", metavar="html|png|svg", help="A page, or its figures.")] = "html",
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE.json", help="Accuracies to show: of eval --json, or a search's search.json."),
    ] = None,
) -> None:
    """Shows a profile: one page to open in a browser, or figures for a paper."""
    from act_export.calibration.recipes import named_calibration
    from act_export.profile.report import accuracies_of
    from act_export.profile.sink_profile import SinkProfile

    if figures not in FORMATS:
        raise ActExportError(f"--format is {figures!r}; it must be {', '.join(FORMATS)}")
    target = out if out is not None else Path("report.html" if figures == "html" else "figures")
    if figures == "html" and target.is_dir():
        raise ActExportError(f"{target} is a folder; pass a file, e.g. --out {target / 'report.html'}")
    if figures == "html" or not target.is_dir():
        check_replaceable(target)
    if figures != "html" and target.is_file():
        raise ActExportError(f"{target} is a file, but {figures} figures are several; pass a folder with --out")
    check_writable(target.absolute() if figures != "html" else target.absolute().parent)
    loaded = SinkProfile.load(profile)
    shown = named_calibration(calibration) if calibration is not None else loaded.calibration
    accuracies = [one for source in (shown, *(evaluation or ())) if source is not None for one in accuracies_of(source)]
    if shown is not None:
        shown.check_fits(loaded.model)
    from act_export.profile.report import write_figures, write_report

    with status() as step:
        step(f"writing {target}")
        if figures == "html":
            write_report(loaded, target, calibration=shown, accuracies=accuracies)
            written = [target]
        else:
            written = write_figures(loaded, target, figures, calibration=shown, accuracies=accuracies)
    for file in written:
        print(file)


def _check_profile_output(out: Path, *, report: bool) -> None:
    """Refuses, before any work, a place that the profile can't be written to, or where another file would be lost."""
    from act_export.profile.sink_profile import FORMAT

    if out.suffix != ".safetensors" or out.is_dir():
        raise ActExportError(f"{out} isn't a file *.safetensors; pass e.g. --out {out.stem or 'profile'}.safetensors")
    for place in (out, out.with_suffix(".json"), *([out.with_suffix(".html")] if report else ())):
        check_replaceable(place)
    document = out.with_suffix(".json")
    if document.exists() and FORMAT.encode() not in document.open("rb").read(200):
        raise ActExportError(
            f"{document} would be written beside {out}, but is there and no profile's; pass another name with --out"
        )
    check_writable(out.resolve().parent)
