"""How many of the ranked heads to calibrate, how strongly, and whether any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from act_export.calibration.file import Calibration, ModelIdentity
from act_export.search.answers import Answers
from act_export.search.rank import first_heads
from act_export.search.request import Threshold
from act_export.tasks.statistics import best_gain_p

SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Candidate:
    """What a calibration does to the choose splits.

    Attributes:
        calibration: Without heads for the plain model.
        answers: By task.
    """

    calibration: Calibration
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


def candidate_calibrations(
    effects: Mapping[float, Tensor], counts: Sequence[int], threshold: Threshold, model: ModelIdentity
) -> list[Calibration]:
    """The first n heads by effect, for each count n and each way to set beta; heads that lose are in none.

    One beta is used alone; a beta below 1 is also tried with each above 1, every head taking the one that suits it.

    Args:
        effects: By beta, (layers, heads), see `act_export.search.rank.Effects`.
        counts: Numbers of heads. One beyond the number of helpful heads stands for all of these.
        threshold: Of all candidates.
        model: The same.

    Returns:
        Without duplicates, the smallest of each way first.
    """
    weak, strong = ([beta for beta in sorted(effects) if (beta < 1) == below] for below in (True, False))
    ways: list[tuple[float, ...]] = [(beta,) for beta in sorted(effects)]
    ways += product(weak, strong)
    found: dict[str, Calibration] = {}
    for way in ways:
        stacked = torch.stack([effects[beta] for beta in way])
        best, which = stacked.max(0)
        helpful = first_heads(best, max(counts))
        for size in sorted({min(count, len(helpful)) for count in counts} - {0}):
            chosen = {head: way[int(which[head])] for head in helpful[:size]}
            calibration = _calibration(chosen, threshold, model)
            found.setdefault(calibration.to_json(), calibration)
    return list(found.values())


def choose(candidates: Sequence[Calibration], plain: Sequence[Answers], answers: Sequence[Sequence[Answers]]) -> Choice:
    """Picks the candidate with the highest accuracy, of equals the likeliest answers, unless its gain may be luck.

    It is refused unless its gain over the plain model has p < 0.05 in a permutation test that picks the best candidate
    anew each time, so that trying more candidates doesn't make a chance finding more likely. All tasks count the same.

    Args:
        candidates: Calibrations that were tried.
        plain: By task, the plain model's answers.
        answers: By candidate and task.
    """
    nothing = Candidate(Calibration({}), tuple(plain))
    tried = [Candidate(c, tuple(row)) for c, row in zip(candidates, answers, strict=True)]
    if not tried:
        return Choice(nothing, (nothing,), 1.0)
    best = max(tried, key=lambda candidate: (candidate.accuracy, candidate.log_likelihood))
    weights = np.concatenate([np.full(len(part.credits), 1 / len(part.credits)) for part in plain])
    p = best_gain_p(_credits(nothing), [_credits(candidate) for candidate in tried], weights=weights)
    return Choice(best if p < SIGNIFICANCE else nothing, (nothing, *tried), p)


def heads_with_betas(calibration: Calibration) -> dict[tuple[int, int], float]:
    """Beta by calibrated head (layer, head)."""
    pairs: dict[tuple[int, int], float] = {}
    for layer, heads in calibration.heads.items():
        betas = calibration.beta[layer] if isinstance(calibration.beta, Mapping) else (calibration.beta,) * len(heads)
        pairs |= {(layer, head): beta for head, beta in zip(heads, betas, strict=True)}
    return pairs


def other_heads(calibration: Calibration, model: ModelIdentity, *, seed: int) -> Calibration:
    """As many heads with the same betas, drawn at random from all of the model's: a control."""
    betas = list(heads_with_betas(calibration).values())
    drawn = np.random.default_rng(seed).permutation(model.num_layers * model.num_heads)[: len(betas)]
    chosen = {divmod(int(index), model.num_heads): beta for index, beta in zip(drawn, betas, strict=True)}
    return _calibration(chosen, Threshold(calibration.threshold, calibration.threshold_mode), model)


def _calibration(betas: Mapping[tuple[int, int], float], threshold: Threshold, model: ModelIdentity) -> Calibration:
    heads: dict[int, tuple[int, ...]] = {}
    for layer, head in sorted(betas):
        heads[layer] = (*heads.get(layer, ()), head)
    same = set(betas.values())
    beta: float | dict[int, tuple[float, ...]] = (
        next(iter(same))
        if len(same) == 1
        else {layer: tuple(betas[layer, head] for head in of) for layer, of in heads.items()}
    )
    return Calibration(heads, beta, threshold.value, threshold.mode, model)


def _credits(candidate: Candidate) -> list[float]:
    return [credit for answers in candidate.answers for credit in answers.credits]
