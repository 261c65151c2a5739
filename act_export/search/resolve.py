"""The calibration to use: given, shipped, or searched."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from act_export.calibration.calibration_set import UNNAMED
from act_export.calibration.file import Calibration
from act_export.calibration.recipes import (
    announce,
    announce_plain,
    find_recipes,
    named_calibration,
    named_calibrations,
    named_recipe,
)
from act_export.calibration.strengths import PLAIN
from act_export.errors import ActExportError
from act_export.progress import Notice, Progress
from act_export.search.job import SearchJob, run_search
from act_export.search.request import SearchOptions, SearchTask, Threshold
from act_export.tasks import Questions
from act_export.tasks.questions import MIX

if TYPE_CHECKING:
    from act_export.checkpoint.load import Checkpoint

MIX_NAME = "mix"
_MIX_SIZES = (24, 40, 96)  # of each task's splits


@dataclass(frozen=True)
class CalibrationRequest:
    """What the user said about the calibration.

    Attributes:
        plain: No calibrated heads: the baseline.
        calibrations: Calibration files, folders of them, or names of shipped recipes.
        questions: Search on these.
        beta: Instead of the calibration's.
        threshold: Instead of the calibration's.
        threshold_mode: Instead of the calibration's.
    """

    plain: bool = False
    calibrations: Sequence[str] = ()
    questions: Questions = field(default_factory=Questions)
    beta: float | None = None
    threshold: float | None = None
    threshold_mode: str | None = None

    def __post_init__(self) -> None:
        """Raises ActExportError for options that contradict each other, or a calibration that isn't there."""
        sources = [
            name
            for name, given in (
                ("--plain", self.plain),
                ("--calibration", self.calibrations),
                ("--task", self.questions.tasks),
                ("--data", self.questions.data),
            )
            if given
        ]
        if len(sources) > 1:
            raise ActExportError(f"{' and '.join(sources)} exclude each other; pass one of them")
        overrides = (self.beta, self.threshold, self.threshold_mode)
        if self.plain and any(value is not None for value in overrides):
            raise ActExportError(
                "--plain has no calibration to change; leave out --beta, --threshold, --threshold-mode"
            )
        # Values out of range are refused here, before any long work.
        Calibration({}).with_overrides(beta=self.beta, threshold=self.threshold, threshold_mode=self.threshold_mode)
        named_calibrations(self.calibrations)


def resolve_calibrations(
    checkpoint: Checkpoint,
    request: CalibrationRequest,
    *,
    tasks: Sequence[SearchTask] | None = None,
    notice: Notice = lambda _: None,
    progress: Progress | None = None,
) -> dict[str, Calibration]:
    """The calibrations to use by name: given, shipped, or searched; none for a plain export.

    Args:
        checkpoint: The model.
        request: What the user asked for.
        tasks: What `asked_questions` gave, if it was called before.
        notice: Called with a line about what was decided.
        progress: For a search.

    Raises:
        ActExportError: If a file doesn't fit the model, or there is no data to search on.
    """
    if request.plain:
        return {}
    found = _without_search(checkpoint, request, notice)
    if found is not None:
        return {
            name: calibration.with_overrides(
                beta=request.beta, threshold=request.threshold, threshold_mode=request.threshold_mode
            )
            for name, calibration in found.items()
        }
    refuse_search(checkpoint)
    if checkpoint.tokenizer is None:
        raise ActExportError(
            f"{checkpoint.name} has no tokenizer, so there is nothing to search heads with; pass --calibration FILE or "
            f"--plain"
        )
    if request.questions.sources:
        return search_calibration(checkpoint, request, tasks=tasks, progress=progress)
    notice(f"no recipe is shipped for this model: searching one set of heads for {', '.join(MIX)}; --plain leaves it")
    return search_mix(checkpoint, request, notice=notice, progress=progress)


def asked_questions(request: CalibrationRequest) -> list[SearchTask] | None:
    """The questions to search on where some were asked for, to be had before a model is loaded.

    Raises:
        ActExportError: As `act_export.search.job.SearchJob.load`.
    """
    return _search_job(request).load() if request.questions.sources else None


def _without_search(
    checkpoint: Checkpoint, request: CalibrationRequest, notice: Notice
) -> dict[str, Calibration] | None:
    """The given calibrations, or the model's recipe where nothing was given; None where a search is asked for."""
    given = named_calibrations(request.calibrations)
    for calibration in given.values():
        calibration.check_fits(checkpoint.identity)
    recipes = find_recipes(checkpoint.identity, checkpoint.names)
    for name in given:
        named = named_recipe(name) if name in request.calibrations else None
        if named is not None:
            notice(announce(named, [recipe for recipe in recipes if recipe.name not in given]))
    if given:
        return given
    if request.questions.sources:
        for recipe in recipes:
            if recipe.tasks == request.questions.tasks:
                notice(f"a recipe for this model is shipped: --calibration {recipe.name} needs no search")
        return None
    if recipes and recipes[0].by_name_only:
        if any(value is not None for value in (request.beta, request.threshold, request.threshold_mode)):
            raise ActExportError(
                f"{announce_plain(recipes)}, and without a calibration there is nothing that --beta, --threshold or "
                f"--threshold-mode could change; name one, or pass --task to search"
            )
        notice(announce_plain(recipes))
        return {}
    if recipes:
        notice(announce(recipes[0], recipes[1:]))
        return {recipes[0].name: recipes[0].calibration}
    return None


def refuse_search(checkpoint: Checkpoint) -> None:
    """Raises ActExportError if the model's weights aren't in memory."""
    if checkpoint.streamed is not None:
        raise ActExportError(
            f"{checkpoint.name} is read one weight at a time, and a search needs it in memory; pass --plain, "
            f"--calibration FILE or a shipped recipe's name, or search first: act-export search --dtype bfloat16 takes "
            f"half the memory, --device-map auto several GPUs"
        )


def search_calibration(
    checkpoint: Checkpoint,
    request: CalibrationRequest,
    *,
    tasks: Sequence[SearchTask] | None = None,
    progress: Progress | None = None,
) -> dict[str, Calibration]:
    """Searches on the requested task or data; see `act_export.search.job`."""
    result = run_search(checkpoint, _search_job(request), tasks=tasks, progress=progress)
    return {_name_of(task): calibration for task, calibration in result.calibrations.items()}


def search_mix(
    checkpoint: Checkpoint,
    request: CalibrationRequest,
    *,
    notice: Notice = lambda _: None,
    progress: Progress | None = None,
) -> dict[str, Calibration]:
    """One set of heads for the mix of tasks, which stands for what models are asked.

    Returns:
        The set, if it gains on average more than luck explains and no task loses beyond it; else nothing: the plain
        model.
    """
    rank, choose, report = _MIX_SIZES
    questions = Questions(MIX, seed=request.questions.seed, truncate=True)
    options = replace(_options(request), random_draws=0)
    job = SearchJob(questions, rank, choose, report, options, own=False)
    result = run_search(checkpoint, job, progress=progress)
    found, average, beyond = result.joint, result.joint_average, result.joint_beyond
    assert found is not None  # a joint search
    if not found.heads:
        notice("no set of heads serves the mix of tasks better than luck explains: this is the plain model")
        return {}
    assert average is not None
    assert beyond is not None
    lost = [name for name, r in result.reports.items() if r.joint is not None and r.joint.interval[1] < 0]
    said = f"the set that was found gains {average.points} on average, {beyond.points} beyond the best cheap remedies"
    if average.interval[0] <= 0 or lost:
        why = f"it loses on {', '.join(lost)}" if lost else "that may be luck"
        notice(f"{said}, but {why}: this is the plain model")
        return {}
    notice(said)
    return {MIX_NAME: found}


def _search_job(request: CalibrationRequest) -> SearchJob:
    return SearchJob(request.questions, options=_options(request))


def _options(request: CalibrationRequest) -> SearchOptions:
    defaults = Calibration({}).with_overrides(
        beta=request.beta, threshold=request.threshold, threshold_mode=request.threshold_mode
    )
    assert isinstance(defaults.beta, float | int)
    return SearchOptions(
        methods=("act",) if request.beta is not None else SearchOptions().methods,  # a fit has betas of its own
        betas=(defaults.beta,),
        thresholds=(Threshold(defaults.threshold, defaults.threshold_mode),),
    )


def _name_of(task: str) -> str:
    """A calibration's name, which has fewer letters than that of data may have."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", task)[:100].strip("-._")
    return name if name not in ("", PLAIN) else UNNAMED


def calibration_to_show(checkpoint: Checkpoint, given: str | None, notice: Callable[[str], None]) -> Calibration | None:
    """The calibration that was given by file or recipe name, else the recipe that fits the model, if there is one.

    Args:
        checkpoint: The model.
        given: A file or name; None for the fitting recipe.
        notice: Called with a line about the recipe that was taken.

    Raises:
        CalibrationError: If it isn't there, or isn't for this model.
    """
    if given is None:
        recipes = find_recipes(checkpoint.identity, checkpoint.names)
        if not recipes:
            return None
        notice(announce(recipes[0], recipes[1:]))
        return recipes[0].calibration
    calibration = named_calibration(given)
    calibration.check_fits(checkpoint.identity)
    return calibration
