"""Measures of scored answers that leaning to one answer doesn't raise, as it may raise accuracy.

A model that gives one answer too often gains accuracy on some data merely by leaning less. Balanced accuracy counts
every answer the same; AUROC looks only at the order of questions; negative log-likelihood and calibration error ask
whether probabilities mean what they say. All are of probabilities among the choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BINS = 15

Row = NDArray[np.float64]


@dataclass(frozen=True)
class Measures:
    """How good scored answers are, beside their accuracy.

    Attributes:
        balanced_accuracy: See `balanced_accuracy`.
        auroc: See `auroc`; None where the questions have different choices, or all the same answer.
        negative_log_likelihood: See `negative_log_likelihood`, in nats.
        expected_calibration_error: See `expected_calibration_error`.
    """

    balanced_accuracy: float
    auroc: float | None
    negative_log_likelihood: float
    expected_calibration_error: float

    def rounded(self) -> Measures:
        """To four places."""
        return Measures(
            round(self.balanced_accuracy, 4),
            None if self.auroc is None else round(self.auroc, 4),
            round(self.negative_log_likelihood, 4),
            round(self.expected_calibration_error, 4),
        )


def measure(scores: Sequence[Sequence[float]], answers: Sequence[int], *, same_choices: bool) -> Measures:
    """All measures of the same answers.

    Args:
        scores: By example, log-likelihoods of its choices, normalized or not.
        answers: By example, index of the right choice.
        same_choices: Whether all examples have the same choices, in the same order.

    Raises:
        ValueError: If there is no example, or not a right answer for each.
    """
    return Measures(
        balanced_accuracy(scores, answers),
        auroc(scores, answers) if same_choices else None,
        negative_log_likelihood(scores, answers),
        expected_calibration_error(scores, answers),
    )


def balanced_accuracy(scores: Sequence[Sequence[float]], answers: Sequence[int]) -> float:
    """Mean, over the answers that occur, of the share of their questions that are answered so.

    An answer is its index. To give one answer always has 1 / (number of answers), however often it is right. Arguments
    and errors as of `measure`.
    """
    right = _right(_log_shares(scores, answers), answers)
    given = np.asarray(answers)
    return float(np.mean([right[given == answer].mean() for answer in np.unique(given)]))


def auroc(scores: Sequence[Sequence[float]], answers: Sequence[int]) -> float | None:
    """How often a question with an answer finds it likelier than one without: 1/2 by chance.

    One answer against the rest, from its probability among the choices, equals counted half; then the mean over the
    answers. Left out is an answer that never or always occurs. Arguments and errors as of `measure`; all examples must
    have the same choices.

    Returns:
        None where no answer is left.
    """
    _check(scores, answers)
    values, given = np.asarray(scores, np.float64), np.asarray(answers)
    areas = []
    for answer in np.unique(given):
        has = given == answer
        if not has.all():
            # odds are in the order of the probabilities, which near certainty would round to equals
            odds = values[:, answer] - np.logaddexp.reduce(np.delete(values, answer, axis=1), axis=1)
            _, places, counts = np.unique(odds, return_inverse=True, return_counts=True)
            ranks = (counts.cumsum() - (counts - 1) / 2)[places]
            areas.append((ranks[has].mean() - (has.sum() + 1) / 2) / (~has).sum())
    return float(np.mean(areas)) if areas else None


def negative_log_likelihood(scores: Sequence[Sequence[float]], answers: Sequence[int]) -> float:
    """Mean, in nats, of the right answer's negative log-probability among the choices.

    Arguments and errors as of `measure`.
    """
    return -float(np.mean([row[answer] for row, answer in zip(_log_shares(scores, answers), answers, strict=True)]))


def expected_calibration_error(scores: Sequence[Sequence[float]], answers: Sequence[int]) -> float:
    """How far confidence, the likeliest choice's probability, is from accuracy; 0 where they agree.

    Mean over 15 bins of equal width, weighed by their examples, of the difference of the two (Guo et al., "On
    Calibration of Modern Neural Networks", ICML 2017). Arguments and errors as of `measure`.
    """
    logs = _log_shares(scores, answers)
    confidence = np.exp([row.max() for row in logs])
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    surplus = np.bincount(bins, weights=_right(logs, answers) - confidence)
    return float(np.abs(surplus).sum() / len(logs))


def _check(scores: Sequence[Sequence[float]], answers: Sequence[int]) -> None:
    if not scores or len(scores) != len(answers):
        raise ValueError(f"{len(scores)} rows of scores with {len(answers)} right answers can't be measured")


def _log_shares(scores: Sequence[Sequence[float]], answers: Sequence[int]) -> list[Row]:
    """By example, log-probabilities among its choices."""
    _check(scores, answers)
    return [np.asarray(row, np.float64) - np.logaddexp.reduce(row) for row in scores]


def _right(logs: Sequence[Row], answers: Sequence[int]) -> Row:
    """(examples,): 1 where the likeliest choice, of equals the first, is right."""
    return np.array([row.argmax() == answer for row, answer in zip(logs, answers, strict=True)], np.float64)
