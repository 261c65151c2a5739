"""Cheap remedies for a model that leans to some answers: what a calibration has to beat.

Each changes scores alone, is fitted on one set of questions and applied to another, and costs nothing when the model
runs. What a calibrated model gains over the plain one with a remedy isn't its lean. Another is in `label_prior`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from act_export.tasks.encoding import EncodedExample

LARGEST_TEMPERATURE = 100.0
_PENALTY = 0.1  # of an offset's square: as if offsets were drawn with a standard deviation of 3 nats
_ENOUGH = 1e-14  # of the mean loss: what a step has to promise
_STEPS = 100

Rows = NDArray[np.float64]


def same_choices(examples: Sequence[EncodedExample]) -> bool:
    """Whether all examples have the same choices, in the same order; only then is there a bias to speak of."""
    return len({example.choices for example in examples}) == 1


def without_choice_bias(
    scores: Sequence[Sequence[float]], others: Sequence[Sequence[float]] | None = None
) -> list[tuple[float, ...]]:
    """Log-probabilities among the choices, less their mean over other questions.

    It needs no right answer (Zhou et al., "Batch Calibration", ICLR 2024).

    Args:
        scores: By example, log-likelihoods of the choices.
        others: The same of other examples, with the same choices. None for each example's others among `scores`; of
            one example alone nothing is taken off.
    """
    logs = _among_choices(scores)
    if others is not None:
        return _tuples(logs - _among_choices(others).mean(0))
    if len(logs) == 1:
        return _tuples(logs)
    return _tuples((logs - logs.mean(0)) * len(logs) / (len(logs) - 1))  # the same as with the others' mean, of each


def with_offsets(scores: Sequence[Sequence[float]], offsets: Sequence[float]) -> list[tuple[float, ...]]:
    """Log-likelihoods of the choices with an offset added to each choice's."""
    return _tuples(np.asarray(scores, np.float64) + np.asarray(offsets))


def fitted_offsets(scores: Sequence[Sequence[float]], answers: Sequence[int]) -> tuple[float, ...]:
    """The offset per choice that makes right answers likeliest: least sum of -log p(answer) + 0.05 * offset².

    Newton's method, which finds the only minimum of this convex sum.

    Args:
        scores: By example, log-likelihoods of the choices, which are the same for all.
        answers: By example, index of the right choice.

    Returns:
        One for each choice, in nats; their sum is 0.
    """
    logs = _among_choices(scores)
    right = np.eye(logs.shape[1])[np.asarray(answers)]

    def loss(offsets: Rows) -> float:
        shifted = logs + offsets
        missed = np.logaddexp.reduce(shifted, axis=1) - (shifted * right).sum(1)
        return float(missed.sum() + _PENALTY / 2 * offsets @ offsets)

    offsets = np.zeros(logs.shape[1])
    for _ in range(_STEPS):
        shares = np.exp(_among_choices(logs + offsets))
        slope = (shares - right).sum(0) + _PENALTY * offsets
        curvature = np.diag(shares.sum(0) + _PENALTY) - shares.T @ shares
        step = -np.linalg.solve(curvature, slope)
        promise = float(slope @ step)
        if promise > -_ENOUGH * len(logs):
            break
        before, length = loss(offsets), 1.0
        while loss(offsets + length * step) > before + length * promise / 4 and length > 1e-9:
            length /= 2
        offsets = offsets + length * step
    return tuple(float(offset) for offset in offsets)


def with_temperature(scores: Sequence[Sequence[float]], temperature: float) -> list[tuple[float, ...]]:
    """Log-likelihoods of the choices divided by the temperature: as sure as they should be, the same answers."""
    return [tuple(score / temperature for score in row) for row in scores]


def fitted_temperature(scores: Sequence[Sequence[float]], answers: Sequence[int]) -> float:
    """The temperature, from 1/100 to 100, that makes right answers likeliest (Guo et al., ICML 2017).

    The negative log-likelihood is convex in 1 / temperature, so halving finds where its slope is 0.

    Args:
        scores: By example, log-likelihoods of its choices.
        answers: By example, index of the right choice.
    """
    rows = [np.asarray(row, np.float64) - row[answer] for row, answer in zip(scores, answers, strict=True)]

    def slope(sharpness: float) -> float:
        weights = [np.exp(sharpness * (row - row.max())) for row in rows]
        return sum(float(row @ weight / weight.sum()) for row, weight in zip(rows, weights, strict=True))

    low, high = -np.log(LARGEST_TEMPERATURE), np.log(LARGEST_TEMPERATURE)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(float(np.exp(middle))) < 0 else (low, middle)
    return float(np.exp(-(low + high) / 2))


def _among_choices(scores: Sequence[Sequence[float]] | Rows) -> Rows:
    values = np.asarray(scores, dtype=np.float64)
    return values - np.logaddexp.reduce(values, axis=1, keepdims=True)


def _tuples(rows: Rows) -> list[tuple[float, ...]]:
    return [tuple(row) for row in rows.tolist()]
