"""Cheap remedies for a model that leans to some answers: what a calibration has to beat.

Each changes scores alone, is fitted on one set of questions and applied to another, and costs nothing when the model
runs. What a calibrated model gains over the plain one with a remedy isn't its lean. Another is in `label_prior`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from act_export.tasks.encoding import EncodedExample

LARGEST_TEMPERATURE = 100.0
_PENALTY = 0.1  # of a square: as if offsets, and sharpness about 1, were drawn with a standard deviation of 3
_LEAST_SHARPNESS = 1e-3  # in units of how far choices are apart: nothing, but it still says which way is better
_ENOUGH = 1e-14  # of the mean loss: what a step has to promise
_STEPS = 100

Rows = NDArray[np.float64]


def same_choices(examples: Sequence[EncodedExample]) -> bool:
    """Whether all examples have the same choices, in the same order."""
    return len({example.choices for example in examples}) == 1


def share_choices(examples: Sequence[EncodedExample]) -> bool:
    """Whether all examples have the same choices, some perhaps not the last ones, as letters of questions with fewer.

    Only then is there a bias to speak of.
    """
    longest = max((example.choices for example in examples), key=len, default=())
    return bool(longest) and all(example.choices == longest[: len(example.choices)] for example in examples)


def without_choice_bias(
    scores: Sequence[Sequence[float]], others: Sequence[Sequence[float]] | None = None
) -> list[tuple[float, ...]]:
    """Log-probabilities among the choices, less their mean over other questions that have the choice.

    Where there are fewer choices each is likelier, so the mean is of how much likelier than by chance a choice is. It
    needs no right answer (Zhou et al., "Batch Calibration", ICLR 2024).

    Args:
        scores: By example, log-likelihoods of the choices.
        others: The same of other examples, with the same choices (`share_choices`). None for each example's others
            among `scores`; from a choice that no other has nothing is taken off.
    """
    logs = _among_choices(scores)
    theirs = logs if others is None else _among_choices(others)
    present = np.isfinite(theirs)
    theirs = theirs + np.log(present.sum(1, keepdims=True))
    counts = np.zeros(max(logs.shape[1], theirs.shape[1]))
    sums = np.zeros_like(counts)
    counts[: theirs.shape[1]], sums[: theirs.shape[1]] = present.sum(0), np.where(present, theirs, 0).sum(0)
    counts, sums = counts[: logs.shape[1]], sums[: logs.shape[1]]
    if others is None:  # of each, without its own
        counts, sums = counts - 1, sums - np.where(present, theirs, 0)
    return _rows(logs - sums / np.maximum(counts, 1), scores)


def with_offsets(scores: Sequence[Sequence[float]], offsets: Sequence[float]) -> list[tuple[float, ...]]:
    """Log-likelihoods of the choices with an offset added to each choice's, as far as it has one."""
    padded = [*offsets, *[0.0] * max(map(len, scores), default=0)]
    return [tuple(score + padded[choice] for choice, score in enumerate(row)) for row in scores]


def fitted_offsets(scores: Sequence[Sequence[float]], answers: Sequence[int]) -> tuple[float, ...]:
    """The offset per choice that makes right answers likeliest: least sum of -log p(answer) + 0.05 * offset².

    Args:
        scores: By example, log-likelihoods of the choices, which are the same for all (`share_choices`).
        answers: By example, index of the right choice.

    Returns:
        One for each choice, in nats; their sum is 0.
    """
    logs = _among_choices(scores)
    choices = logs.shape[1]
    features = np.broadcast_to(np.eye(choices), (len(logs), choices, choices))
    return tuple(_fitted(logs, features, np.asarray(answers), np.zeros(choices)).tolist())


class Remedy(NamedTuple):
    """What sets a model's confidence and its lean right: sharpness * log-likelihood + offset.

    Attributes:
        sharpness: 1 / temperature, above 0.
        offsets: By choice, in nats; none where questions don't share their choices.
    """

    sharpness: float
    offsets: tuple[float, ...] = ()


def fitted_remedy(scores: Sequence[Sequence[float]], answers: Sequence[int], *, offsets: bool) -> Remedy:
    """The temperature, and the offset per choice, that make right answers likeliest.

    Both are drawn a little: offsets to taking off the mean preference for a choice, the sharpness to 1 in units of how
    far choices are apart without it. So a model that is surer, or leans more, comes to the same answers.

    Args:
        scores: By example, log-likelihoods of its choices.
        answers: By example, index of the right choice.
        offsets: Fit offsets too; the examples `share_choices`.
    """
    logs, right = _among_choices(scores), np.asarray(answers)
    present = np.isfinite(logs)
    absent, logs = np.where(present, 0, -np.inf), np.where(present, logs, 0)
    apart = np.where(present, logs - logs.sum(1, keepdims=True) / present.sum(1, keepdims=True), 0)
    means = apart.sum(0) / np.maximum(present.sum(0), 1) if offsets else np.zeros(logs.shape[1])
    apart = np.where(present, apart - means, 0)
    scale = float(np.sqrt((apart**2).sum() / present.sum())) or 1.0
    count = logs.shape[1] if offsets else 0
    identity = np.broadcast_to(np.eye(logs.shape[1])[:, :count], (*logs.shape, count))
    features, start = np.concatenate([apart[..., None] / scale, identity], 2), np.eye(1, 1 + count)[0]
    found = _fitted(absent, features, right, start)
    if found[0] < _LEAST_SHARPNESS:  # the likelier, the less often right: the best is to ignore it
        found = _fitted(absent, features * (np.arange(1 + count) > 0), right, np.zeros_like(start))
    sharpness = max(float(found[0]), _LEAST_SHARPNESS) / scale
    return Remedy(sharpness, tuple((found[1:] - sharpness * means).tolist()) if offsets else ())


def remedied_log_likelihoods(
    scores: Sequence[Sequence[float]], answers: Sequence[int], *, offsets: bool
) -> tuple[float, ...]:
    """Log-probability of each right answer among its choices, once the best remedy is applied.

    What is left of a model's worth when neither its lean nor its confidence counts. The remedy is fitted to these very
    answers, so two models are compared only if both are treated so. Arguments as of `fitted_remedy`.

    Returns:
        By example, at most 0.
    """
    remedy = fitted_remedy(scores, answers, offsets=offsets)
    sharp = [[remedy.sharpness * score for score in row] for row in scores]
    logs = _among_choices(with_offsets(sharp, remedy.offsets))
    return tuple(logs[np.arange(len(logs)), np.asarray(answers)].tolist())


def _fitted(base: Rows, features: Rows, answers: NDArray[np.int_], start: Rows) -> Rows:
    """Weights w, near the start, that make right answers likeliest when choices score base + features @ w.

    Newton's method, which finds the only minimum of this convex sum.

    Args:
        base: (examples, choices).
        features: (examples, choices, weights).
        answers: (examples,), index of the right choice.
        start: (weights,).
    """
    right = np.eye(base.shape[1])[answers]

    def loss(weights: Rows) -> float:
        missed = -_among_choices(base + features @ weights)[np.arange(len(base)), answers].sum()
        return float(missed + _PENALTY / 2 * (weights - start) @ (weights - start))

    weights = start
    for _ in range(_STEPS):
        shares = np.exp(_among_choices(base + features @ weights))
        slope = np.einsum("nk,nkw->w", shares - right, features) + _PENALTY * (weights - start)
        mean = np.einsum("nk,nkw->nw", shares, features)
        curvature = np.einsum("nk,nkw,nkv->wv", shares, features, features) - mean.T @ mean
        step = -np.linalg.solve(curvature + _PENALTY * np.eye(len(weights)), slope)
        promise = float(slope @ step)
        if promise > -_ENOUGH * len(base):
            break
        before, length = loss(weights), 1.0
        while loss(weights + length * step) > before + length * promise / 4 and length > 1e-9:
            length /= 2
        weights = weights + length * step
    return weights


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
    """Log-probabilities (examples, most choices): minus infinity where an example has fewer."""
    values = np.full((len(scores), max(map(len, scores))), -np.inf)
    for row, given in zip(values, scores, strict=True):
        row[: len(given)] = given
    return values - np.logaddexp.reduce(values, axis=1, keepdims=True)


def _rows(values: Rows, like: Sequence[Sequence[float]]) -> list[tuple[float, ...]]:
    return [tuple(row[: len(given)]) for row, given in zip(values.tolist(), like, strict=True)]
