"""What an evaluation finds: per task, and the average over tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from act_export.errors import ActExportError
from act_export.runtime.device import Device
from act_export.tasks import Questions
from act_export.tasks.statistics import mean_interval
from act_export.verify.evaluate.answers import AnswerEvaluation, Comparison, Evaluation, compare
from act_export.verify.evaluate.held_out import DEFAULT_SPLIT, SPLITS


@dataclass(frozen=True)
class TaskResult:
    """One task.

    Attributes:
        name: Of the task or the data.
        questions: By example, the digest of its question, see `act_export.tasks.prompt_digest`.
        calibrated: Of the file.
        plain: Of the file it is compared with, on the same questions.
        control: The plain model's answers with its label prior taken off, see `act_export.tasks.label_prior`. None
            where there is no plain model or a question has no content-free prompt.
    """

    name: str
    questions: tuple[str, ...]
    calibrated: Evaluation | AnswerEvaluation
    plain: Evaluation | AnswerEvaluation | None = None
    control: Evaluation | None = None

    @property
    def comparisons(self) -> Mapping[str, Comparison]:
        """By metric, what calibration gains; nothing where there is no plain model."""
        if self.plain is None:
            return {}
        return {metric: compare(self.plain, self.calibrated, metric=metric) for metric in self.calibrated.metrics}

    @property
    def beyond_control(self) -> Comparison | None:
        """What the calibrated model gains over the control."""
        return compare(self.control, self.calibrated) if self.control is not None else None


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
        control: Of the plain model with its label prior taken off; None unless every task has it.
    """

    calibrated: float
    calibrated_interval: tuple[float, float]
    plain: float | None = None
    plain_interval: tuple[float, float] | None = None
    gain: float | None = None
    gain_interval: tuple[float, float] | None = None
    control: float | None = None


@dataclass(frozen=True)
class EvaluationReport:
    """Everything that was measured.

    Attributes:
        request: What was asked for.
        tasks: In the order of the request.
        average: Over them.
    """

    request: EvaluationRequest
    tasks: tuple[TaskResult, ...]
    average: Average


def average_over(results: Sequence[TaskResult]) -> Average:
    """The average of one or more tasks."""
    calibrated = [result.calibrated.metrics[result.calibrated.main_metric] for result in results]
    average = Average(_mean_of_means(calibrated), mean_interval(calibrated))
    controls = [result.control.metrics[result.control.main_metric] for result in results if result.control is not None]
    if len(controls) == len(results):
        average = replace(average, control=_mean_of_means(controls))
    plain = [result.plain.metrics[result.plain.main_metric] for result in results if result.plain is not None]
    if len(plain) < len(results):
        return average
    gains = [[new - old for old, new in zip(*pair, strict=True)] for pair in zip(plain, calibrated, strict=True)]
    return replace(
        average,
        plain=_mean_of_means(plain),
        plain_interval=mean_interval(plain),
        gain=_mean_of_means(gains),
        gain_interval=mean_interval(gains),
    )


def _mean_of_means(groups: Sequence[Sequence[float]]) -> float:
    return sum(sum(group) / len(group) for group in groups) / len(groups)


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate, and how.

    Attributes:
        file: The exported model, or its folder.
        against: Another file of the same model to compare with; None for this one without calibration.
        questions: What to ask, and how. Without a seed, that of the file's own search.
        split: "report", "held-out" or "all", see `act_export.verify.evaluate.held_out`.
        limit: Questions of each task at the most; None for all.
        batch_tokens: Tokens that run together at the most; None leaves it to act-export.
        portable: Run the portable functions, not the native library.
        device: "cpu", "cuda" or "cuda:N".
        tokenizer: Where the tokenizer is; None looks beside the file, then where the model came from.
        trust_remote_code: Whether code that comes with the tokenizer may run.
        calibration: Name of one of the file's calibrations, or a calibration file; None for the file's default.
    """

    file: Path
    against: Path | None = None
    questions: Questions = field(default_factory=Questions)
    split: str = DEFAULT_SPLIT
    limit: int | None = None
    batch_tokens: int | None = None
    portable: bool = False
    device: str = "cpu"
    tokenizer: str | None = None
    trust_remote_code: bool = False
    calibration: str | None = None

    def __post_init__(self) -> None:
        """Raises ActExportError for a value out of range, SessionError for a device that isn't one."""
        Device.parse(self.device)
        if self.split not in SPLITS:
            raise ActExportError(f"there is no split {self.split!r}; pass report, held-out or all")
        if not self.questions.sources:
            raise ActExportError("there is nothing to evaluate on; pass a task or a data file")
        for name, value in (("limit", self.limit), ("batch tokens", self.batch_tokens)):
            if value is not None and value < 1:
                raise ActExportError(f"{name} is {value}; give 1 or more")
