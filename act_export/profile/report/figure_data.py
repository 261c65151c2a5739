"""The numbers behind the figures, computed once for the page and for files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from act_export.calibration.file import Calibration, ModelIdentity
from act_export.profile.report.accuracy import TaskAccuracy
from act_export.profile.report.token_text import visible_text
from act_export.profile.sink_statistics import ABSOLUTE, POSITION_EDGES, RELATIVE, RELATIVE_BINS, Floats, SinkStatistics

Columns = Mapping[str, Sequence[Any] | NDArray[Any]]
"""A table: its columns by name, all of one length."""

CALIBRATED, PLAIN = "calibrated", "not calibrated"
POSITIONS = (RELATIVE, ABSOLUTE)
_MAIN_LAYERS = 3  # named beside a token


@dataclass(frozen=True, eq=False)
class PositionRates:
    """How often a token is a later sink, by where it stands.

    A rate is the share of (token, head) pairs in which the token is a later sink, in [0, 1].

    Attributes:
        starts: Where each bin starts (bins,): a position, or a share of the way through the prompt in percent.
        ends: Where the next one starts (bins,).
        ranges: The positions of each bin in words, bins of them.
        overall: Rate over all layers and heads (bins,).
        by_layer: Rate over a layer's heads (layers, bins).
    """

    starts: Floats
    ends: Floats
    ranges: tuple[str, ...]
    overall: Floats
    by_layer: Floats


def head_places(model: ModelIdentity, calibration: Calibration | None) -> dict[str, list[Any]]:
    """Columns layer, head, status, beta of every head: layer by layer, as the arrays of `head_statistics`.

    beta is "" where a head isn't calibrated.
    """
    betas = calibrated_betas(calibration)
    places = [(layer, head) for layer in range(model.num_layers) for head in range(model.num_heads)]
    return {
        "layer": [layer for layer, _ in places],
        "head": [head for _, head in places],
        "status": [CALIBRATED if place in betas else PLAIN for place in places],
        "beta": [f"{betas[place]:g}" if place in betas else "" for place in places],
    }


def calibrated_betas(calibration: Calibration | None) -> dict[tuple[int, int], float]:
    """Beta by (layer, head) of the calibrated heads."""
    if calibration is None:
        return {}
    shares = {layer: calibration.layer(layer) for layer in calibration.heads}
    return {
        (layer, head): beta
        for layer, share in shares.items()
        if share is not None
        for head, beta in zip(share.heads, share.beta, strict=True)
    }


def head_statistics(statistics: SinkStatistics, mode: str) -> dict[str, Floats]:
    """Columns of the figures by head, (layers * heads,) each; "effect" only where effects were measured."""
    sinks = statistics.by[mode]
    columns = {
        "mass": sinks.mass,
        "count": sinks.count,
        "rate": sinks.rate,
        "initial_rate": sinks.initial_rate,
        "initial_score": statistics.initial_score,
        "entropy": statistics.entropy,
    }
    if statistics.effects is not None:
        columns["effect"] = statistics.effects
    return {name: values.reshape(-1) for name, values in columns.items()}


def position_rates(statistics: SinkStatistics, mode: str, positions: str) -> PositionRates:
    """Rates of later sinks; bins that no token was in are left out.

    Args:
        statistics: Of a source.
        mode: Of the threshold.
        positions: "relative" or "absolute".
    """
    sinks = statistics.by[mode]
    if positions == RELATIVE:
        counts, exposure = sinks.relative_positions, statistics.relative_exposure
        edges = np.linspace(0, 100, RELATIVE_BINS + 1)
    else:
        counts, exposure = sinks.absolute_positions, statistics.absolute_exposure
        edges = np.minimum([*POSITION_EDGES, np.inf], max(statistics.longest, 2))
    seen = np.flatnonzero(exposure > 0)
    starts, ends = edges[seen], edges[seen + 1]
    by_layer = counts.mean(1, dtype=np.float64)[:, seen] * statistics.prompts / exposure[seen]
    return PositionRates(
        starts=starts.astype(np.float32),
        ends=ends.astype(np.float32),
        ranges=tuple(_range(positions, start, end) for start, end in zip(starts, ends, strict=True)),
        overall=by_layer.mean(0).astype(np.float32),
        by_layer=by_layer.astype(np.float32),
    )


def rates_overall(rates: PositionRates) -> dict[str, Any]:
    """The rates over all layers as a table: start, end, range, rate."""
    return {"start": rates.starts, "end": rates.ends, "range": rates.ranges, "rate": rates.overall}


def rates_by_layer(rates: PositionRates) -> dict[str, Any]:
    """The rates as a table: layer, start, end, range, rate."""
    layers, bins = rates.by_layer.shape
    return {
        "layer": np.repeat(np.arange(layers), bins),
        "start": np.tile(rates.starts, layers),
        "end": np.tile(rates.ends, layers),
        "range": rates.ranges * layers,
        "rate": rates.by_layer.reshape(-1),
    }


def token_rows(statistics: SinkStatistics, mode: str, num_heads: int, limit: int) -> list[dict[str, Any]]:
    """The tokens that took most attention as later sinks.

    Returns:
        A row per token: text, id, occurrences, how often a head of a layer had an occurrence as a sink (share), its
        part of all that later sinks took (mass), that outside what all prompts begin with (outside), and the layers
        where it was a sink most often.
    """
    tokens = statistics.by[mode].tokens
    total = float(tokens.mass.sum(dtype=np.float64))
    rows = []
    for index in range(min(limit, len(tokens.ids))):
        sinks, occurrences = tokens.sinks[index], int(tokens.occurrences[index])
        most = [int(layer) for layer in np.argsort(-sinks, kind="stable")[:_MAIN_LAYERS] if sinks[layer] > 0]
        pairs = occurrences * len(sinks) * num_heads
        rows.append(
            {
                "text": visible_text(tokens.texts[index]),
                "id": int(tokens.ids[index]),
                "occurrences": occurrences,
                "share": float(sinks.sum()) / pairs if pairs else 0.0,
                "mass": float(tokens.mass[index]) / total if total else 0.0,
                "outside": float(tokens.mass_outside[index]) / total if total else 0.0,
                "layers": most,
            }
        )
    return rows


def accuracy_columns(accuracies: Sequence[TaskAccuracy]) -> dict[str, list[Any]]:
    """Two rows for each accuracy, plain and calibrated: task, model, value, low, high, interval.

    low and high are the ends of its interval, None where it has none, and interval is both in words, "" there.
    """
    names = accuracy_names(accuracies)
    rows = [
        (name, model, value, *(interval or (None, None)), _percent_range(interval) if interval else "")
        for name, accuracy in zip(names, accuracies, strict=True)
        for model, value, interval in (
            ("plain", accuracy.plain, accuracy.plain_interval),
            ("calibrated", accuracy.calibrated, accuracy.calibrated_interval),
        )
    ]
    columns = ("task", "model", "value", "low", "high", "interval")
    return {column: [row[at] for row in rows] for at, column in enumerate(columns)}


def have_intervals(accuracies: Sequence[TaskAccuracy]) -> bool:
    """Whether any of the accuracies has an interval of its own."""
    return any(each.plain_interval or each.calibrated_interval for each in accuracies)


def accuracy_names(accuracies: Sequence[TaskAccuracy]) -> list[str]:
    """What to call each, no two alike: the task, with what measured it where that differs."""
    several = len({accuracy.measured_with for accuracy in accuracies}) > 1
    names = [f"{a.task} ({a.measured_with})" if several else a.task for a in accuracies]
    return [
        name if names.count(name) == 1 else f"{name}, {names[: at + 1].count(name)}" for at, name in enumerate(names)
    ]


def _percent_range(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.1%} to {interval[1]:.1%}"


def _range(positions: str, start: float, end: float) -> str:
    if positions == RELATIVE:
        return f"{start:g} to {end:g}%"
    return f"{start:g}" if end == start + 1 else f"{start:g} to {end - 1:g}"


def rows_of(columns: Columns) -> list[dict[str, Any]]:
    """A table row by row."""
    values = [column.tolist() if isinstance(column, np.ndarray) else column for column in columns.values()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]
