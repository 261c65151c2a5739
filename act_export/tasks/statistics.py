"""Is a gain more than luck? Paired statistics over right and wrong answers to the same questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
_NORMAL_QUANTILE = 1.959963984540054  # of CONFIDENCE, two-sided
_RESAMPLES = 10_000
_BLOCK = 500  # resamples at a time: memory, not the result


def accuracy_interval(correct: int, total: int) -> tuple[float, float]:
    """95% interval of an accuracy, by Wilson's score.

    Raises:
        ValueError: If the counts are not those of an accuracy.
    """
    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"{correct} correct of {total} is not an accuracy")
    z = _NORMAL_QUANTILE
    center = correct + z * z / 2
    half = z * math.sqrt(correct * (total - correct) / total + z * z / 4)
    return max(0.0, (center - half) / (total + z * z)), min(1.0, (center + half) / (total + z * z))


def gain_interval(plain: ArrayLike, calibrated: ArrayLike, *, seed: int = 0) -> tuple[float, float]:
    """95% interval of the gain in accuracy, by a paired bootstrap: questions are drawn anew, answers stay paired.

    Args:
        plain: Boolean (examples,): answered rightly without calibration.
        calibrated: Boolean (examples,): with it.
        seed: Of the bootstrap.
    """
    gained, lost, total = _changes(plain, calibrated)
    shares = np.array([gained, lost, total - gained - lost]) / total
    draws = np.random.default_rng(seed).multinomial(total, shares, size=_RESAMPLES)
    low, high = np.quantile((draws[:, 0] - draws[:, 1]) / total, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def detectable_gain(examples: int) -> float:
    """The smallest gain in accuracy that so many examples can tell from luck, about: half its 95% interval.

    It is taken that a quarter of the answers change, as they do where a lean to one answer goes.
    """
    return _NORMAL_QUANTILE * math.sqrt(0.25 / examples)


def mean_interval(groups: Sequence[Sequence[float]], *, seed: int = 0) -> tuple[float, float]:
    """95% interval of the mean of the groups' means: numbers are drawn anew within each group.

    With differences between two models' numbers on the same questions it is a paired bootstrap of the gain; with the
    questions of a task as a group, that of the average over tasks.

    Args:
        groups: One or more, each with at least one number.
        seed: Of the bootstrap.

    Raises:
        ValueError: If there is no group, or one is empty.
    """
    if not groups or not all(len(group) for group in groups):
        raise ValueError("there is no group of numbers, or one is empty")
    random = np.random.default_rng(seed)
    means = sum(_resampled_means(np.asarray(group, np.float64), random) for group in groups) / len(groups)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def mcnemar_p(plain: ArrayLike, calibrated: ArrayLike) -> float:
    """Exact two-sided McNemar test: how often chance alone would split the changed answers at least this unevenly.

    Args:
        plain: Boolean (examples,): answered rightly without calibration.
        calibrated: Boolean (examples,): with it.
    """
    gained, lost, _ = _changes(plain, calibrated)
    changed = gained + lost
    tail = sum(math.comb(changed, k) for k in range(min(gained, lost) + 1))
    return float(min(1.0, 2 * tail / 2**changed))


def best_gain_p(plain: ArrayLike, candidates: ArrayLike, *, weights: ArrayLike | None = None, seed: int = 0) -> float:
    """How often the best of several candidates would gain this much if calibration changed nothing on average.

    A permutation test: plain and calibrated answers are exchanged, question by question and for all candidates at once,
    and the best candidate is picked anew. So the p-value already pays for having looked at many candidates, however
    alike they are. With one candidate and answers that are right or wrong it is the one-sided McNemar test.

    Args:
        plain: (examples,): what each answer is worth without calibration, as 1 where it is right and 0 where not.
        candidates: (candidates, examples): with each candidate.
        weights: (examples,): what each example counts; None for the same.
        seed: Of the permutations.
    """
    differences = np.asarray(candidates, dtype=np.float64) - np.asarray(plain, dtype=np.float64)
    if weights is not None:
        differences = differences * np.asarray(weights, dtype=np.float64)
    signs = np.random.default_rng(seed).choice(np.array([-1.0, 1.0]), size=(_RESAMPLES, differences.shape[1]))
    best = (signs @ differences.T).max(1)
    gain = differences.sum(1).max()
    reached = int((best >= gain - 1e-9 * max(1.0, abs(gain))).sum())
    return (1 + reached) / (1 + _RESAMPLES)


def _changes(plain: ArrayLike, calibrated: ArrayLike) -> tuple[int, int, int]:
    before: NDArray[Any] = np.asarray(plain, dtype=bool)
    after: NDArray[Any] = np.asarray(calibrated, dtype=bool)
    if before.shape != after.shape or before.ndim != 1 or before.size == 0:
        raise ValueError(f"answers of shapes {before.shape} and {after.shape} are not pairs")
    return int((after & ~before).sum()), int((before & ~after).sum()), before.size


def _resampled_means(values: NDArray[np.float64], random: np.random.Generator) -> NDArray[np.float64]:
    """(resamples,): means of as many values, drawn with replacement; equal values are drawn together."""
    different, counts = np.unique(values, return_counts=True)
    shares = counts / counts.sum()
    blocks = [random.multinomial(len(values), shares, size=_BLOCK) @ different for _ in range(_RESAMPLES // _BLOCK)]
    return np.concatenate(blocks) / len(values)
