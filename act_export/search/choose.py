"""Which of all proposed calibrations is used, and whether any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from act_export.search.answers import Answers
from act_export.search.proposals import Proposal
from act_export.tasks.statistics import best_gain_p

SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Candidate:
    """What a proposal does to the choose splits.

    Attributes:
        proposal: None for the plain model.
        answers: By task.
    """

    proposal: Proposal | None
    answers: tuple[Answers, ...]

    @property
    def accuracy(self) -> float:
        """Mean accuracy over the tasks."""
        return float(np.mean([answers.accuracy for answers in self.answers]))

    @property
    def log_likelihood(self) -> float:
        """Mean log-likelihood of the right answers over the tasks."""
        return float(np.mean([answers.log_likelihood for answers in self.answers]))


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


Worth = Callable[[int, Answers], Sequence[float]]
"""What each answer to a task, by its index, is worth."""


def choose(
    proposals: Sequence[Proposal],
    plain: Sequence[Answers],
    answers: Sequence[Sequence[Answers]],
    worth: Worth = lambda _, answers: answers.credits,
) -> Choice:
    """Picks the candidate with the best answers, of equals those with the likeliest, unless its gain may be luck.

    It is refused unless its gain over the plain model has p < 0.05 in a permutation test that picks the best candidate
    anew each time, so that trying more candidates doesn't make a chance finding more likely. All tasks count the same.

    Args:
        proposals: That were tried.
        plain: By task, the plain model's answers.
        answers: By proposal and task.
        worth: Best by what; else accuracy.
    """
    nothing = Candidate(None, tuple(plain))
    tried = [Candidate(proposal, tuple(row)) for proposal, row in zip(proposals, answers, strict=True)]
    if not tried:
        return Choice(nothing, (nothing,), 1.0)
    weights = np.concatenate([np.full(len(part.credits), 1 / len(part.credits)) for part in plain])
    worths = [np.concatenate([worth(*part) for part in enumerate(c.answers)]) for c in (nothing, *tried)]
    totals = [round(float(each @ weights), 9) for each in worths[1:]]  # equal ones may differ by rounding
    best = max(zip(totals, tried, strict=True), key=lambda pair: (pair[0], pair[1].log_likelihood))[1]
    p = best_gain_p(worths[0], worths[1:], weights=weights)
    return Choice(best if p < SIGNIFICANCE else nothing, (nothing, *tried), p)
