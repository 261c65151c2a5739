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
        worth: What the choice is made by: mean of what each answer is worth, over the tasks.
    """

    proposal: Proposal | None
    answers: tuple[Answers, ...]
    worth: float

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
            `act_export.tasks.statistics.best_gain_p`; 1 where it has no more right answers.
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
    right: Worth | None = None,
) -> Choice:
    """Picks the candidate with the best answers, of equals those with the likeliest, unless its gain may be luck.

    It is refused unless its gain over the plain model has p < 0.05 in a permutation test that picks the best candidate
    anew each time, so that trying more candidates doesn't make a chance finding more likely. All tasks count the same.

    Args:
        proposals: That were tried.
        plain: By task, the plain model's answers.
        answers: By proposal and task.
        worth: Best by what; else accuracy.
        right: Which answers are right, where `worth` is something else that one question can decide: a candidate that
            has no more of them than the plain model is refused.
    """
    weights = np.concatenate([np.full(len(part.credits), 1 / len(part.credits) / len(plain)) for part in plain])
    rows = [tuple(plain), *map(tuple, answers)]
    worths = [np.concatenate([worth(*part) for part in enumerate(row)]) for row in rows]
    nothing, *tried = (
        Candidate(proposal, row, round(float(each @ weights), 9))  # equal ones may differ by rounding
        for proposal, row, each in zip((None, *proposals), rows, worths, strict=True)
    )
    if not tried:
        return Choice(nothing, (nothing,), 1.0)
    best = max(tried, key=lambda candidate: (candidate.worth, candidate.log_likelihood))
    if right is not None:
        before, after = (np.concatenate([right(*p) for p in enumerate(row)]) @ weights for row in (plain, best.answers))
        if after <= before + 1e-9:  # equal ones may differ by rounding
            return Choice(nothing, (nothing, *tried), 1.0)
    p = best_gain_p(worths[0], worths[1:], weights=weights)
    return Choice(best if p < SIGNIFICANCE else nothing, (nothing, *tried), p)
