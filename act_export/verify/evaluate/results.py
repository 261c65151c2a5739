"""What an evaluation finds: per task, and the average over tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from act_export.tasks.statistics import mean_interval
from act_export.verify.evaluate.answers import AnswerEvaluation, Comparison, Evaluation, compare
from act_export.verify.evaluate.request import PLAIN, EvaluationRequest

LABEL_PRIOR, CHOICE_BIAS = "label_prior", "choice_bias"  # what a control takes off the plain model's answers


@dataclass(frozen=True)
class TaskResult:
    """One task.

    Attributes:
        name: Of the task or the data.
        questions: By example, the digest of its question, see `act_export.tasks.prompt_digest`.
        calibrated: Of the file.
        plain: Of the file it is compared with, on the same questions.
        controls: The plain model's answers with a cheap remedy, by its name: "label_prior", where each question has a
            content-free prompt, see `act_export.tasks.label_prior`; "choice_bias", where all share their choices, its
            mean taken over the other questions, see `act_export.tasks.remedies`. None where no file is plain.
    """

    name: str
    questions: tuple[str, ...]
    calibrated: Evaluation | AnswerEvaluation
    plain: Evaluation | AnswerEvaluation | None = None
    controls: Mapping[str, Evaluation] = field(default_factory=dict)

    @property
    def comparisons(self) -> Mapping[str, Comparison]:
        """By metric, what calibration gains; nothing where there is no plain model."""
        if self.plain is None:
            return {}
        return {metric: compare(self.plain, self.calibrated, metric=metric) for metric in self.calibrated.metrics}

    @property
    def beyond_controls(self) -> Mapping[str, Comparison]:
        """By control, what calibration gains over it; nothing where there is no plain model."""
        if self.plain is None:
            return {}
        return {name: compare(control, self.calibrated) for name, control in self.controls.items()}

    @property
    def best_control(self) -> tuple[str, Evaluation | AnswerEvaluation] | None:
        """What is best without calibration, in hindsight: "plain" or a control, and its answers.

        None where there is no plain model.
        """
        if self.plain is None:
            return None
        without = {PLAIN: self.plain, **self.controls}
        name = max(without, key=lambda name: fmean(_main(without[name])))
        return name, without[name]

    @property
    def beyond_best_control(self) -> Comparison | None:
        """What calibration gains over that."""
        return compare(self.best_control[1], self.calibrated) if self.best_control is not None else None


@dataclass(frozen=True)
class Average:
    """Mean over the tasks of their main metrics, with 95% intervals by a bootstrap that draws within each task.

    Attributes:
        calibrated: Of the file.
        calibrated_interval: Of it.
        plain: Of the file it is compared with.
        plain_interval: Of it.
        gain: Calibrated minus plain.
        gain_interval: Paired.
        best_control: Of what is best on each task without calibration, see `TaskResult.best_control`.
        beyond_best_control: Calibrated minus that.
        beyond_best_control_interval: Paired.
    """

    calibrated: float
    calibrated_interval: tuple[float, float]
    plain: float | None = None
    plain_interval: tuple[float, float] | None = None
    gain: float | None = None
    gain_interval: tuple[float, float] | None = None
    best_control: float | None = None
    beyond_best_control: float | None = None
    beyond_best_control_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class EvaluationReport:
    """Everything that was measured.

    Attributes:
        request: What was asked for.
        tasks: In the order of the request.
        average: Over them.
        others: Where the file's default, the plain model, was measured alone: its calibrations.
    """

    request: EvaluationRequest
    tasks: tuple[TaskResult, ...]
    average: Average
    others: tuple[str, ...] = ()


def average_over(results: Sequence[TaskResult]) -> Average:
    """The average of one or more tasks."""
    calibrated = [_main(result.calibrated) for result in results]
    plain = [_main(result.plain) for result in results if result.plain is not None]
    best = [_main(result.best_control[1]) for result in results if result.best_control is not None]
    average = Average(_mean_of_means(calibrated), mean_interval(calibrated))
    if len(plain) < len(results):
        return average
    gains, beyond = _differences(plain, calibrated), _differences(best, calibrated)
    return replace(
        average,
        plain=_mean_of_means(plain),
        plain_interval=mean_interval(plain),
        gain=_mean_of_means(gains),
        gain_interval=mean_interval(gains),
        best_control=_mean_of_means(best),
        beyond_best_control=_mean_of_means(beyond),
        beyond_best_control_interval=mean_interval(beyond),
    )


def _main(evaluation: Evaluation | AnswerEvaluation) -> tuple[float, ...]:
    return evaluation.metrics[evaluation.main_metric]


def _differences(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[new - old for old, new in zip(*pair, strict=True)] for pair in zip(before, after, strict=True)]


def _mean_of_means(groups: Sequence[Sequence[float]]) -> float:
    return sum(sum(group) / len(group) for group in groups) / len(groups)
