"""What a profile says, in sentences with numbers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from act_export.calibration.file import Calibration
from act_export.profile.report.figure_data import calibrated_betas
from act_export.profile.sink_statistics import ABSOLUTE, LaterSinks, SinkStatistics


def key_facts(statistics: SinkStatistics, mode: str, calibration: Calibration | None) -> list[str]:
    """The main facts about the sinks of a source.

    Args:
        statistics: Of the source.
        mode: Of the threshold.
        calibration: Whose heads are compared with the rest; None for none.
    """
    sinks = statistics.by[mode]
    facts = [_where(sinks), _initial(statistics, sinks)]
    if float(sinks.mass.sum()) > 0:
        facts.insert(1, _how_much(sinks))
    share = _calibrated_share(sinks, calibration)
    if share:
        facts.append(share)
    return facts


def threshold_text(sinks: LaterSinks) -> str:
    """The threshold as a formula."""
    if sinks.mode == ABSOLUTE:
        return f"sink score above {sinks.threshold:g}"
    return f"sink score above {sinks.threshold:g} / T, T the tokens of the prompt"


def effect_facts(statistics: SinkStatistics) -> list[str]:
    """What the effects of a source's heads say; nothing where they weren't measured."""
    effects = statistics.effects
    if effects is None:
        return []
    hurts, helps = int((effects > 0).sum()), int((effects < 0).sum())
    neither = effects.size - hurts - helps
    layer, head = (int(index) for index in np.unravel_index(int(np.abs(effects).argmax()), effects.shape))
    correlation = _rank_correlation(effects, statistics.by[ABSOLUTE].mass)
    return [
        f"Of {_counted(effects.size, 'head')}, calibrating one alone would make right answers likelier in {hurts} "
        f"(their sinks hurt) and less likely in {helps} (their sinks help)."
        + (f" In {neither} it would change nothing." if neither else ""),
        f"The strongest effect is {effects[layer, head]:+.2g} in a right answer's log-likelihood, in layer "
        f"{layer}, head {head}.",
        f"The Spearman rank correlation of effect and later-sink mass (absolute threshold) is {correlation:+.2f}.",
        f"Effects are means over {_counted(statistics.effect_prompts, 'prompt')}.",
    ]


def _where(sinks: LaterSinks) -> str:
    having = sinks.count > 0
    layers = int(having.any(1).sum())
    if not layers:
        return f"No head of {having.size} has a later sink ({threshold_text(sinks)})."
    return (
        f"Later sinks exist in {int(having.sum())} of {having.size} heads ({having.mean():.0%}), in {layers} of "
        f"{_counted(len(having), 'layer')}."
    )


def _how_much(sinks: LaterSinks) -> str:
    by_layer = sinks.mass.mean(1, dtype=np.float64)
    first, last = _densest_half(by_layer)
    where = f"layer {first} has" if first == last else f"layers {first} to {last} have"
    part = by_layer[first : last + 1].sum() / by_layer.sum()
    return f"They take {_percent(float(by_layer.mean()))} of all attention; {where} {part:.0%} of that."


def _initial(statistics: SinkStatistics, sinks: LaterSinks) -> str:
    usual = sinks.initial_rate > 0.5
    score = float(statistics.initial_score.mean(dtype=np.float64))
    return (
        f"The initial token is a sink in {usual.mean():.0%} of heads, in most prompts; its sink score is {score:.2f} "
        f"in the mean over all heads."
    )


def _calibrated_share(sinks: LaterSinks, calibration: Calibration | None) -> str:
    places = list(calibrated_betas(calibration))
    total = float(sinks.mass.sum(dtype=np.float64))
    if not places or total == 0:
        return ""
    mass = float(sum(float(sinks.mass[place]) for place in places))
    heads = f"{len(places)} of {_counted(sinks.mass.size, 'head')} ({len(places) / sinks.mass.size:.0%})"
    return f"Calibrated are {heads}; of all attention on later sinks, {mass / total:.0%} is theirs."


def _densest_half(mass: NDArray[np.float64]) -> tuple[int, int]:
    """The fewest neighbouring layers that have half of it or more; of several, those with most."""
    ends = np.concatenate([[0.0], np.cumsum(mass)])
    half = ends[-1] / 2
    spans = [(first, last) for first in range(len(mass)) for last in range(first, len(mass))]
    enough = [(first, last) for first, last in spans if ends[last + 1] - ends[first] >= half * (1 - 1e-9)]
    return min(enough, key=lambda span: (span[1] - span[0], -(ends[span[1] + 1] - ends[span[0]])))


def _rank_correlation(left: NDArray[np.float32], right: NDArray[np.float32]) -> float:
    ranks = [_ranks(values.reshape(-1)) for values in (left, right)]
    deviations = [values - values.mean() for values in ranks]
    scale = float(np.sqrt((deviations[0] ** 2).sum() * (deviations[1] ** 2).sum()))
    return float((deviations[0] * deviations[1]).sum()) / scale if scale else 0.0


def _ranks(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Equal values share the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    means: NDArray[np.float64] = (last - (counts - 1) / 2)[place]
    return means


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else f"{100 * share:.2g}%"


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
