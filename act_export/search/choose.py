"""How many of the ranked heads to calibrate, and whether any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from act_export.tasks import EncodedExample, predicted_choice
from act_export.tasks.statistics import best_gain_p

HEAD_COUNTS = (1, 2, 3, 5, 8, 10, 15, 20, 30, 40, 60)
SIGNIFICANCE = 0.05

Scores = list[tuple[float, ...]]
Heads = dict[int, tuple[int, ...]]


@dataclass(frozen=True)
class Candidate:
    """What a set of calibrated heads does to the choose split.

    Attributes:
        heads: Calibrated heads by layer.
        scores: By example, log-likelihoods of the choices.
        correct: By example, whether the answer is right.
        log_likelihood: Mean log-likelihood of the right answer among the choices.
    """

    heads: Heads
    scores: Scores
    correct: tuple[bool, ...]
    log_likelihood: float

    @property
    def num_heads(self) -> int:
        """Number of calibrated heads."""
        return sum(map(len, self.heads.values()))

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return sum(self.correct) / len(self.correct)


@dataclass(frozen=True)
class Choice:
    """The decision, and what it rests on.

    Attributes:
        chosen: The best candidate; the plain model where no candidate gains more than luck explains.
        candidates: All that were tried, the plain model first.
        p: How often the best candidate would gain this much if calibration changed nothing, see
            `act_export.tasks.statistics.best_gain_p`.
    """

    chosen: Candidate
    candidates: tuple[Candidate, ...]
    p: float

    @property
    def heads(self) -> Heads:
        """Chosen heads by layer; may be empty."""
        return self.chosen.heads


def candidate_heads(gradients: Tensor, counts: Sequence[int] = HEAD_COUNTS) -> list[Heads]:
    """The first n heads by gradient, for each count n; heads with no positive gradient are in none.

    Args:
        gradients: (layers, heads), see `act_export.search.gates.gate_gradients`.
        counts: Numbers of heads. One beyond the number of helpful heads stands for all of these.

    Returns:
        Heads by layer, without duplicates, the smallest first.
    """
    helpful = int((gradients > 0).sum())
    order = torch.argsort(gradients.flatten(), descending=True, stable=True)[:helpful].tolist()
    sizes = sorted({min(count, helpful) for count in counts} - {0})
    num_heads = gradients.shape[1]
    sets = []
    for size in sizes:
        heads: dict[int, list[int]] = {}
        for index in sorted(order[:size]):
            heads.setdefault(index // num_heads, []).append(index % num_heads)
        sets.append({layer: tuple(indices) for layer, indices in heads.items()})
    return sets


def choose_heads(
    candidates: Sequence[Heads], examples: Sequence[EncodedExample], score: Callable[[Heads], Scores], *, seed: int = 0
) -> Choice:
    """Picks the candidate with the highest accuracy, of equals the likeliest answers, unless its gain may be luck.

    It is refused unless its gain over the plain model has p < 0.05 in a permutation test that picks the best candidate
    anew each time, so that trying more candidates doesn't make a chance finding more likely.

    Args:
        candidates: Sets of heads to try.
        examples: The choose split.
        score: Log-likelihoods of the choices of all examples, with these heads calibrated.
        seed: Of the permutation test.
    """
    plain = _candidate({}, examples, score({}))
    tried = [_candidate(heads, examples, score(heads)) for heads in candidates]
    if not tried:
        return Choice(plain, (plain,), 1.0)
    best = max(tried, key=lambda candidate: (candidate.accuracy, candidate.log_likelihood))
    p = best_gain_p(plain.correct, [candidate.correct for candidate in tried], seed=seed)
    return Choice(best if p < SIGNIFICANCE else plain, (plain, *tried), p)


def right_answers(examples: Sequence[EncodedExample], scores: Scores) -> tuple[bool, ...]:
    """By example, whether the likeliest choice is the right one."""
    return tuple(predicted_choice(row) == example.answer for example, row in zip(examples, scores, strict=True))


def _candidate(heads: Heads, examples: Sequence[EncodedExample], scores: Scores) -> Candidate:
    log_likelihoods = [
        row[example.answer] - float(np.logaddexp.reduce(row)) for example, row in zip(examples, scores, strict=True)
    ]
    return Candidate(heads, scores, right_answers(examples, scores), float(np.mean(log_likelihoods)))
