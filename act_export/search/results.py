"""What a search found: for each task the heads, what they gain, and what else would have gained it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from act_export.calibration.file import Calibration
from act_export.search.answers import Answers
from act_export.tasks.measures import Measures
from act_export.tasks.statistics import gain_interval, mcnemar_p, mean_interval

CONTROL = "control "
WITH_REMEDY = " with remedy"


@dataclass(frozen=True)
class Gain:
    """Accuracy of a calibrated model on the questions that the plain one answered too.

    Attributes:
        accuracy: Of the calibrated model.
        gain: Over the plain model.
        interval: 95% interval of the gain, by a paired bootstrap.
        p: McNemar's; None where answers are more than right or wrong.
    """

    accuracy: float
    gain: float
    interval: tuple[float, float]
    p: float | None

    @property
    def points(self) -> str:
        """The gain with its interval, in words."""
        low, high = (100 * bound for bound in self.interval)
        return f"{100 * self.gain:+.1f} points ({low:+.1f} to {high:+.1f})"


@dataclass(frozen=True)
class Invalid:
    """First tokens that begin none of the choices.

    Attributes:
        share: Of all answers.
        accuracy: Of the other answers; None where there are none.
    """

    share: float
    accuracy: float | None


@dataclass(frozen=True)
class TaskReport:
    """What a search found on one task, on questions that took no part in it.

    Attributes:
        task: Its name.
        plain_accuracy: Without calibration.
        own: With the set found on this task; None where no set helped.
        joint: With the set found on all tasks together; None where there is none.
        random_heads: Accuracies with as many heads drawn at random as the task's own set has.
        controls: Accuracies of the plain model with each cheap remedy that fits, and with none: see
            `act_export.search.controls`.
        control: The best of them.
        beyond: What the task's own set gains over the best; None where no set helped.
        with_remedy: What the task's own set adds for a program that has the best control's remedy anyway: with that
            remedy on both models, fitted to each.
        joint_beyond: As `beyond`, of the joint set.
        joint_with_remedy: As `with_remedy`, of the joint set.
        measures: Of the plain model and with the task's own set; None where answers are generated.
        invalid: Shares of first tokens that begin no choice, plain and calibrated, and the accuracies of the others;
            None where first tokens aren't compared.
        choice_bias: Accuracies of the plain model and with the task's own set, both without their mean preference for a
            choice, see `act_export.tasks.remedies`; None where questions don't share their choices.
        published: Accuracies with the head sets that others published for this model, by name.
        predicted_shares: How often each choice is given, plain and calibrated.
        p: Of the choice of the own set.
        choose_accuracy: By what was tried, accuracy on the choose split.
        forward_passes: Forward passes of one prompt that ranking the heads took.
        sizes: Questions of each split.
        duplicates: Questions left out of the splits because they are another's.
    """

    task: str
    plain_accuracy: float
    own: Gain | None
    joint: Gain | None
    random_heads: tuple[float, ...]
    controls: Mapping[str, float]
    control: str
    beyond: Gain | None
    with_remedy: Gain | None
    joint_beyond: Gain | None
    joint_with_remedy: Gain | None
    measures: tuple[Measures, Measures | None] | None
    invalid: tuple[Invalid, Invalid | None] | None
    choice_bias: tuple[float, float] | None
    published: Mapping[str, float]
    predicted_shares: tuple[tuple[float, ...], tuple[float, ...]] | None
    p: float
    choose_accuracy: Mapping[str, float]
    forward_passes: float
    sizes: Mapping[str, int]
    duplicates: int


class Averages(NamedTuple):
    """Mean gains over tasks: over plain, beyond each task's best control, and with that control's remedy on both."""

    gain: Gain | None = None
    beyond: Gain | None = None
    with_remedy: Gain | None = None


NO_AVERAGES = Averages()


@dataclass(frozen=True)
class SearchResult:
    """All that a search found.

    Attributes:
        calibrations: By task, for this model only; without heads where no set helped.
        joint: Found on all tasks together, None where the search was on one or no joint set was asked for.
        reports: By task.
        average: Mean gain of the tasks' own sets over all tasks, 0 counting for those without; None for one task.
        average_beyond: Their mean gain over the best control of each task.
        average_with_remedy: The same with that control's remedy on both models.
        joint_average: As `average`, for the joint set.
        joint_beyond: As `average_beyond`, for the joint set.
        joint_with_remedy: As `average_with_remedy`, for the joint set.
        units: How many units of work this run computed, and how many there were.
        damaged: Lines of the journal that were left out.
        answers: By task, answers to its reported questions: "plain", "own" where a set helped, "own" and `WITH_REMEDY`
            for that with the best control's remedy, and of each control by `CONTROL` and its name.
    """

    calibrations: Mapping[str, Calibration]
    joint: Calibration | None
    reports: Mapping[str, TaskReport]
    average: Gain | None = None
    average_beyond: Gain | None = None
    average_with_remedy: Gain | None = None
    joint_average: Gain | None = None
    joint_beyond: Gain | None = None
    joint_with_remedy: Gain | None = None
    units: tuple[int, int] = field(default=(0, 0), compare=False)
    damaged: int = field(default=0, compare=False)
    answers: Mapping[str, Mapping[str, Answers]] = field(default_factory=dict, compare=False, repr=False)


def invalid_of(answers: Answers) -> Invalid | None:
    """None where first tokens aren't compared."""
    if answers.invalid is None:
        return None
    accuracy = answers.valid_accuracy
    return Invalid(round(answers.invalid, 4), None if accuracy is None else round(accuracy, 4))


def gain_of(plain: Answers, calibrated: Answers) -> Gain:
    """What calibration gains on the same questions."""
    differences = [after - before for before, after in zip(plain.credits, calibrated.credits, strict=True)]
    binary = all(credit in (0, 1) for credit in (*plain.credits, *calibrated.credits))
    return Gain(
        accuracy=round(calibrated.accuracy, 4),
        gain=round(float(np.mean(differences)), 4),
        interval=_rounded(gain_interval(plain.credits, calibrated.credits) if binary else mean_interval([differences])),
        p=float(f"{mcnemar_p(plain.credits, calibrated.credits):.2g}") if binary else None,
    )


def average_gain(plain: Mapping[str, Answers], calibrated: Mapping[str, Answers]) -> Gain:
    """Mean gain over tasks; its interval draws questions anew within each task."""
    differences = [
        [after - before for before, after in zip(plain[task].credits, calibrated[task].credits, strict=True)]
        for task in plain
    ]
    return Gain(
        accuracy=round(float(np.mean([answers.accuracy for answers in calibrated.values()])), 4),
        gain=round(float(np.mean([np.mean(part) for part in differences])), 4),
        interval=_rounded(mean_interval(differences)),
        p=None,
    )


def _rounded(interval: tuple[float, float]) -> tuple[float, float]:
    return round(interval[0], 4), round(interval[1], 4)
