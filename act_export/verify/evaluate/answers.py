"""How a model answers the questions of one task, and what calibration gains on the same questions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from act_export.errors import ActExportError
from act_export.tasks.metrics import exact_match, token_f1
from act_export.tasks.scoring import predicted_choice
from act_export.tasks.statistics import accuracy_interval, gain_interval, mcnemar_p, mean_interval

if TYPE_CHECKING:
    pass


ACCURACY, EXACT_MATCH, F1 = "accuracy", "exact_match", "f1"


@dataclass(frozen=True)
class Evaluation:
    """How a model answers by choosing.

    Attributes:
        log_likelihoods: By example, one per choice.
        predictions: By example, index of the likeliest choice.
        answers: By example, index of the right choice.
    """

    log_likelihoods: tuple[tuple[float, ...], ...]
    predictions: tuple[int, ...]
    answers: tuple[int, ...]

    @classmethod
    def of(cls, scores: Sequence[tuple[float, ...]], answers: Iterable[int]) -> Evaluation:
        """Of log-likelihoods, and the right choices."""
        return cls(tuple(scores), tuple(map(predicted_choice, scores)), tuple(answers))

    @property
    def correct(self) -> tuple[bool, ...]:
        """By example, whether the prediction is right."""
        return tuple(map(int.__eq__, self.predictions, self.answers))

    @property
    def accuracy(self) -> float:
        """Share of right predictions."""
        return sum(self.correct) / len(self.correct)

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the accuracy."""
        return accuracy_interval(sum(self.correct), len(self.correct))

    @property
    def main_metric(self) -> str:
        """The metric that averages over tasks are of."""
        return ACCURACY

    @property
    def metrics(self) -> Mapping[str, tuple[float, ...]]:
        """By metric, each example's number, in [0, 1]."""
        return {ACCURACY: tuple(map(float, self.correct))}

    @property
    def questions_asked(self) -> tuple[object, ...]:
        """What two evaluations of the same examples agree in."""
        return self.answers


@dataclass(frozen=True)
class AnswerEvaluation:
    """How a model answers in its own words.

    Attributes:
        texts: By example, what it said.
        references: By example, texts that count as right.
        exact_match: By example, 1 where it said one of these, else 0; see `act_export.tasks.metrics`.
        f1: By example, F1 over words against the best of these.
        main_metric: "exact_match" or "f1": the metric that averages over tasks are of.
    """

    texts: tuple[str, ...]
    references: tuple[tuple[str, ...], ...]
    exact_match: tuple[float, ...]
    f1: tuple[float, ...]
    main_metric: str

    @classmethod
    def of(cls, texts: Sequence[str], references: Sequence[tuple[str, ...]], metric: str) -> AnswerEvaluation:
        """Of what was said, the texts that count as right, and a task's metric, "exact" or "f1"."""
        exact, f1 = tuple(map(exact_match, texts, references)), tuple(map(token_f1, texts, references))
        return cls(tuple(texts), tuple(references), exact, f1, EXACT_MATCH if metric == "exact" else F1)

    @property
    def metrics(self) -> Mapping[str, tuple[float, ...]]:
        """By metric, each example's number, in [0, 1]."""
        return {EXACT_MATCH: self.exact_match, F1: self.f1}

    @property
    def questions_asked(self) -> tuple[object, ...]:
        """What two evaluations of the same examples agree in."""
        return self.references


@dataclass(frozen=True)
class Comparison:
    """What calibration changes, on the same examples.

    Attributes:
        gain: The calibrated model's mean minus the plain model's.
        interval: 95% interval of the gain, by a paired bootstrap.
        p: McNemar's, exact and two-sided: how often luck alone makes so uneven a change. None for F1, where an answer
            is right by part.
        gained: Number of examples that the calibrated model answers better.
        lost: Number of examples that the plain model answers better.
    """

    gain: float
    interval: tuple[float, float]
    p: float | None
    gained: int
    lost: int


def compare(
    plain: Evaluation | AnswerEvaluation, calibrated: Evaluation | AnswerEvaluation, *, metric: str | None = None
) -> Comparison:
    """What the second evaluation gains over the first.

    Args:
        plain: Of the plain model.
        calibrated: Of the calibrated model, on the same examples.
        metric: One of the evaluations' `metrics`; None for the main one.

    Raises:
        ActExportError: If they aren't of the same examples.
    """
    if plain.questions_asked != calibrated.questions_asked:
        raise ActExportError(
            f"the evaluations have {len(plain.questions_asked)} and {len(calibrated.questions_asked)} examples with "
            f"different answers; compare two models on the same examples"
        )
    metric = metric or plain.main_metric
    before, after = plain.metrics[metric], calibrated.metrics[metric]
    differences = [new - old for old, new in zip(before, after, strict=True)]
    by_part = metric == F1
    return Comparison(
        gain=sum(differences) / len(differences),
        interval=mean_interval([differences]) if by_part else gain_interval(before, after),
        p=None if by_part else mcnemar_p(before, after),
        gained=sum(difference > 0 for difference in differences),
        lost=sum(difference < 0 for difference in differences),
    )


def metric_interval(evaluation: Evaluation | AnswerEvaluation, metric: str) -> tuple[float, float]:
    """95% interval of a metric's mean: by Wilson's score, of F1 by a bootstrap."""
    values = evaluation.metrics[metric]
    return mean_interval([values]) if metric == F1 else accuracy_interval(int(sum(values)), len(values))
