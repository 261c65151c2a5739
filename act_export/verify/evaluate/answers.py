"""How a model answers the questions of one task, and what calibration gains on the same questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from act_export.errors import ActExportError
from act_export.tasks import EncodedExample
from act_export.tasks.measures import Measures, measure
from act_export.tasks.metrics import exact_match, token_f1
from act_export.tasks.remedies import same_choices
from act_export.tasks.scoring import predicted_choice, scores_of_choices
from act_export.tasks.statistics import accuracy_interval, gain_interval, mcnemar_p, mean_interval

ACCURACY, EXACT_MATCH, F1 = "accuracy", "exact_match", "f1"
INVALID, VALID_ACCURACY = "invalid", "valid_accuracy"

Share = tuple[float, tuple[float, float]]
"""A mean, and its 95% interval."""


@dataclass(frozen=True)
class Evaluation:
    """How a model answers by choosing.

    Attributes:
        log_likelihoods: By example, one per choice.
        predictions: By example, index of the likeliest choice; None where the likeliest first token is no choice's.
        answers: By example, index of the right choice.
        same_choices: Whether all examples have the same choices, in the same order.
        first_token: Whether first tokens are compared, see `act_export.tasks.scoring`.
    """

    log_likelihoods: tuple[tuple[float, ...], ...]
    predictions: tuple[int | None, ...]
    answers: tuple[int, ...]
    same_choices: bool = False
    first_token: bool = False

    @classmethod
    def of(cls, scores: Sequence[tuple[float, ...]], examples: Sequence[EncodedExample]) -> Evaluation:
        """Of rows of scores, as `act_export.tasks.scoring.score_choices` gives them, or of the choices alone."""
        said = [predicted_choice(row) for row in scores]
        return cls(
            tuple(scores_of_choices(scores, examples)),
            tuple(choice if choice < len(e.choices) else None for choice, e in zip(said, examples, strict=True)),
            tuple(example.answer for example in examples),
            same_choices(examples),
            any(example.first_token for example in examples),
        )

    @property
    def correct(self) -> tuple[bool, ...]:
        """By example, whether the prediction is right."""
        return tuple(said == right for said, right in zip(self.predictions, self.answers, strict=True))

    @property
    def accuracy(self) -> float:
        """Share of right predictions."""
        return sum(self.correct) / len(self.correct)

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the accuracy."""
        return accuracy_interval(sum(self.correct), len(self.correct))

    @property
    def measures(self) -> Measures:
        """What leaning to an answer doesn't raise, among the choices."""
        return measure(self.log_likelihoods, self.answers, same_choices=self.same_choices)

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


def shares(evaluation: Evaluation | AnswerEvaluation) -> dict[str, Share]:
    """By metric its mean and interval: by Wilson's score, of F1 by a bootstrap.

    Where first tokens are compared, also "invalid", how many answers are no choice, and "valid_accuracy", how many of
    the others are right; without this one where there is none.
    """
    found = {
        metric: (fmean(values), mean_interval([values])) if metric == F1 else _share(int(sum(values)), len(values))
        for metric, values in evaluation.metrics.items()
    }
    if isinstance(evaluation, Evaluation) and evaluation.first_token:
        invalid, total = evaluation.predictions.count(None), len(evaluation.predictions)
        found[INVALID] = _share(invalid, total)
        if invalid < total:
            found[VALID_ACCURACY] = _share(sum(evaluation.correct), total - invalid)
    return found


def _share(count: int, total: int) -> Share:
    return count / total, accuracy_interval(count, total)
