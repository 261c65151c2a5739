"""Whether calibration is worth it: several searches on one set of questions, and what they come to.

The searches report on different questions, so that together they are a cross-validation of the search: what it finds on
some questions is measured on others, and where it finds nothing the plain model's answers count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from act_export.calibration.file import Calibration
from act_export.checkpoint.load import Checkpoint
from act_export.errors import ActExportError
from act_export.progress import Progress
from act_export.search.answers import Answers
from act_export.search.elsewhere import (
    TextCost,
    cost_in_answers,
    cost_in_text,
    pieces_of,
    questions_elsewhere,
    used_questions,
)
from act_export.search.job import SearchJob, run_search
from act_export.search.request import SearchOptions
from act_export.search.results import CONTROL, Gain, SearchResult, gain_of
from act_export.search.trial_data import TrialData
from act_export.tasks.questions import MIX
from act_export.tasks.remedies import fitted_offsets
from act_export.tasks.statistics import accuracy_interval

PLAIN = "plain"
_QUESTIONS_ELSEWHERE, _PIECES_ELSEWHERE = 48, 8


@dataclass(frozen=True)
class Trial:
    """What the searches come to, on questions that each had not seen.

    Attributes:
        plain: Accuracy of the plain model.
        at_chance: Whether that may be chance.
        remedies: By name, what each cheap remedy of the plain model gains, fitted on the questions of each search.
        remedy: The best of them; "plain" where none gains.
        calibrated: What calibration gains over the plain model.
        beyond: What it gains over the best remedy.
        offsets: By answer, what to add to the plain model's log-likelihood of it, in nats, fitted on all questions;
            none where these don't share their choices.
        found: In how many searches a set of heads was found.
        calibration: The one with the smallest p; None where none was found.
        leans: Whether the plain model only leans: `at_chance`, but with a remedy or calibration, whose gain isn't luck,
            above it.
    """

    plain: float
    at_chance: bool
    remedies: Mapping[str, Gain]
    remedy: str
    calibrated: Gain
    beyond: Gain
    offsets: Mapping[str, float]
    found: int
    calibration: Calibration | None
    leans: bool = False

    @property
    def verdict(self) -> str:
        """What to do.

        "calibrate": it gains, and more than any remedy. "remedy": one gains, and that calibration gains more isn't
        shown. "either": calibration gains; that it gains more than the best remedy isn't shown, nor that this gains.
        "plain": calibration gains nothing. "undecided": the questions don't show whether it gains.
        """
        gains = self.calibrated.interval[0] > 0
        if gains and self.beyond.interval[0] > 0:
            return "calibrate"
        if self.remedy != PLAIN and self.remedies[self.remedy].interval[0] > 0:
            return "remedy"
        if gains:
            return "either"
        return "plain" if self.found == 0 or self.calibrated.interval[1] <= 0 else "undecided"


@dataclass(frozen=True)
class Elsewhere:
    """What a calibration costs on other questions.

    Attributes:
        tasks: By task, what it gains.
        text: What it does to a text; None where no text could be had.
        missing: Why what is missing is missing, a line each.
    """

    tasks: Mapping[str, Gain]
    text: TextCost | None
    missing: tuple[str, ...] = ()

    @property
    def lost(self) -> tuple[str, ...]:
        """Where something is lost beyond luck."""
        tasks = [name for name, gain in self.tasks.items() if gain.interval[1] < 0]
        return (*tasks, *(["text"] if self.text is not None and self.text.intervals[0][1] < 0 else []))


def run_trial(
    checkpoint: Checkpoint,
    data: TrialData,
    options: SearchOptions | None = None,
    *,
    progress: Progress | None = None,
) -> Trial:
    """Searches, and measures; interrupted, the same call goes on where it stopped.

    Args:
        checkpoint: The model.
        data: What `trial_data` gave.
        options: How to search; None for the defaults.
        progress: Called after every unit of work.

    Raises:
        ActExportError: As `act_export.search.search_heads`.
    """
    job = SearchJob(data.searches[0].questions, options=replace(options or SearchOptions(), random_draws=0))
    results = []
    for number, task in enumerate(data.searches):
        results.append(run_search(checkpoint, job, tasks=[task], progress=_part(progress, number, len(data.searches))))
    return summarize(data, results)


def summarize(data: TrialData, results: Sequence[SearchResult]) -> Trial:
    """What the searches of a trial come to, their questions taken together."""
    answers = [result.answers[data.name] for result in results]
    plain = _together([of[PLAIN] for of in answers])
    calibrated = _together([of.get("own", of[PLAIN]) for of in answers])
    names = [name for name in answers[0] if name.startswith(CONTROL) and all(name in of for of in answers)]
    remedies = {name.removeprefix(CONTROL): _together([of[name] for of in answers]) for name in names}
    remedies = {PLAIN: remedies.pop(PLAIN, plain), **remedies}
    best = max(remedies, key=lambda name: remedies[name].accuracy)
    found = [
        (result.reports[data.name].p, number)
        for number, result in enumerate(results)
        if result.calibrations[data.name].heads
    ]
    count = len(plain.credits)

    def is_above_chance(accuracy: float) -> bool:
        return data.chance is None or accuracy_interval(round(accuracy * count), count)[0] > data.chance

    gains = {name: gain_of(plain, of) for name, of in remedies.items() if name != PLAIN}
    gained = gain_of(plain, calibrated)
    at_chance = not is_above_chance(plain.accuracy)
    leans = any(gain.interval[0] > 0 and is_above_chance(gain.accuracy) for gain in (*gains.values(), gained))
    return Trial(
        round(plain.accuracy, 4),
        at_chance,
        gains,
        best,
        gained,
        gain_of(remedies[best], calibrated),
        _offsets(data, plain),
        len(found),
        results[min(found)[1]].calibrations[data.name] if found else None,
        at_chance and leans,
    )


def elsewhere(
    checkpoint: Checkpoint, calibration: Calibration, *, without: str = "", progress: Progress | None = None
) -> Elsewhere:
    """Measures a calibration on the mix of tasks and on a text.

    What can't be had, as rows that have to be fetched, is left out and named.

    Args:
        checkpoint: The model, with a tokenizer.
        calibration: To measure.
        without: A task that isn't measured: the one it was found on.
        progress: Called with each task.
    """
    used = used_questions([calibration])
    gains: dict[str, Gain] = {}
    text, missing = None, []
    names = [name for name in MIX if name != without]
    for number, name in enumerate(names):
        if progress is not None:
            progress(f"elsewhere: {name}", number / (len(names) + 1))
        try:
            questions = questions_elsewhere(name, _QUESTIONS_ELSEWHERE, used)
            _, (gains[name],) = cost_in_answers(checkpoint, name, questions, [calibration])
        except ActExportError as error:
            missing.append(f"{name} isn't measured: {error}")
    if progress is not None:
        progress("elsewhere: a text", len(names) / (len(names) + 1))
    try:
        pieces = pieces_of(checkpoint, None, _PIECES_ELSEWHERE)
        text = cost_in_text(checkpoint, pieces, [calibration])
    except ActExportError as error:
        missing.append(f"perplexity isn't measured: {error}")
    return Elsewhere(gains, text, tuple(missing))


def _together(parts: Sequence[Answers]) -> Answers:
    """Answers to the questions of all parts."""
    credits = tuple(credit for part in parts for credit in part.credits)
    return Answers(tuple(row for part in parts for row in part.scores), credits, 0.0)


def _offsets(data: TrialData, plain: Answers) -> dict[str, float]:
    reported = [example for task in data.searches for example in task.splits.report]
    longest = max((example.choices for example in reported), key=len)
    if data.searches[0].generation is not None or any(e.choices != longest[: len(e.choices)] for e in reported):
        return {}
    offsets = fitted_offsets(plain.scores, [example.answer for example in reported])
    return dict(zip(longest, (round(offset, 4) for offset in offsets), strict=True))


def _part(progress: Progress | None, number: int, count: int) -> Progress | None:
    if progress is None:
        return None
    return lambda step, done: progress(f"{number + 1} of {count}: {step}", (number + done) / count)
