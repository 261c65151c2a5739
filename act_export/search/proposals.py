"""Calibrations that a search tries: the first heads of a ranking, by either knob, and fitted strengths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from act_export.calibration.file import Calibration, ModelIdentity, Strength
from act_export.search.rank import first_heads
from act_export.search.request import Threshold

_ABOUT_ONE = 0.02  # strengths whose logarithm is smaller are taken as 1


class Proposal(NamedTuple):
    """A calibration to try.

    Attributes:
        method: That found it.
        label: Says what it is, e.g. "act: 10 heads".
        calibration: With heads.
    """

    method: str
    label: str
    calibration: Calibration


def first_heads_by_beta(
    effects: Mapping[float, Tensor], counts: Sequence[int], threshold: Threshold, model: ModelIdentity
) -> list[Proposal]:
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
    found = []
    for way in ways:
        best, which = torch.stack([effects[beta] for beta in way]).max(0)
        betas = torch.tensor(way, dtype=torch.float64)[which]
        said = f", beta {' and '.join(f'{beta:g}' for beta in way)}" if len(ways) > 1 else ""
        found += _first("act", best, torch.stack([betas, torch.ones_like(betas)]), counts, said, threshold, model)
    return _different(found)


def first_heads_by_gamma(
    slope: Tensor, gammas: Sequence[float], counts: Sequence[int], threshold: Threshold, model: ModelIdentity
) -> list[Proposal]:
    """The heads whose initial token matters most, for each count and gamma; each takes gamma or 1 / gamma.

    Args:
        slope: Derivative of the mean log-likelihood by log(gamma), (layers, heads).
        gammas: To try.
        counts: Numbers of heads.
        threshold: Of all candidates.
        model: The same.
    """
    found = []
    for gamma in gammas:
        strengths = torch.stack([torch.ones_like(slope), (slope.sign() * abs(math.log(gamma))).exp()])
        said = f", gamma {gamma:g}" if len(gammas) > 1 else ""
        found += _first("gamma", slope.abs(), strengths, counts, said, threshold, model)
    return _different(found)


def fitted(strengths: Mapping[int, Tensor], said: str, threshold: Threshold, model: ModelIdentity) -> list[Proposal]:
    """All heads whose fitted strengths aren't about 1.

    Args:
        strengths: By step, beta and gamma (2, layers, heads).
        said: To tell several fits apart.
        threshold: Of all candidates.
        model: The same.
    """
    found = []
    for step, of_step in strengths.items():
        of_step = torch.where(of_step.log().abs() > _ABOUT_ONE, of_step, 1.0)
        touched = (of_step != 1).any(0)
        found += _first(
            "fit", touched.double(), of_step, [touched.numel()], f" after {step} steps{said}", threshold, model
        )
    return _different(found)


def _first(
    method: str,
    effect: Tensor,
    strengths: Tensor,
    counts: Sequence[int],
    said: str,
    threshold: Threshold,
    model: ModelIdentity,
) -> list[Proposal]:
    """Proposals of the first heads by effect with strengths (2, layers, heads), one for each count."""
    helpful = first_heads(effect, max(counts))
    proposals = []
    for size in sorted({min(count, len(helpful)) for count in counts} - {0}):
        chosen = {
            (layer, head): (round(float(strengths[0, layer, head]), 4), round(float(strengths[1, layer, head]), 4))
            for layer, head in helpful[:size]
        }
        label = f"{method}: {size} heads{said}" if size > 1 else f"{method}: 1 head{said}"
        proposals.append(Proposal(method, label, with_strengths(chosen, threshold, model)))
    return proposals


def _different(proposals: Sequence[Proposal]) -> list[Proposal]:
    return list({proposal.calibration.to_json(): proposal for proposal in reversed(proposals)}.values())[::-1]


def strengths_by_head(calibration: Calibration) -> dict[tuple[int, int], tuple[float, float]]:
    """Beta and gamma by calibrated head (layer, head)."""
    pairs: dict[tuple[int, int], tuple[float, float]] = {}
    for index in calibration.heads:
        layer = calibration.layer(index)
        assert layer is not None  # it has heads
        for head, beta, gamma in zip(layer.heads, layer.beta, layer.gamma, strict=True):
            pairs[index, head] = beta, gamma
    return pairs


def other_heads(calibration: Calibration, model: ModelIdentity, *, seed: int) -> Calibration:
    """As many heads with the same strengths, drawn at random from all of the model's: a control."""
    strengths = list(strengths_by_head(calibration).values())
    drawn = np.random.default_rng(seed).permutation(model.num_layers * model.num_heads)[: len(strengths)]
    chosen = {divmod(int(index), model.num_heads): pair for index, pair in zip(drawn, strengths, strict=True)}
    return with_strengths(chosen, Threshold(calibration.threshold, calibration.threshold_mode), model)


def with_strengths(
    strengths: Mapping[tuple[int, int], tuple[float, float]], threshold: Threshold, model: ModelIdentity
) -> Calibration:
    """A calibration of beta and gamma by (layer, head)."""
    heads: dict[int, tuple[int, ...]] = {}
    for layer, head in sorted(strengths):
        heads[layer] = (*heads.get(layer, ()), head)

    def knob(which: int) -> Strength:
        same = {pair[which] for pair in strengths.values()}
        if len(same) == 1:
            return next(iter(same))
        return {layer: tuple(strengths[layer, head][which] for head in of) for layer, of in heads.items()}

    return Calibration(heads, knob(0), threshold.value, threshold.mode, model, gamma=knob(1))
