"""The data of the page: everything that its script draws, as JSON."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from act_export.calibration.file import Calibration
from act_export.profile.report.accuracy import TaskAccuracy
from act_export.profile.report.attention_maps import STEPS, encode_shares, head_maps, layer_maps
from act_export.profile.report.facts import effect_facts, key_facts, threshold_text
from act_export.profile.report.figure_data import (
    POSITIONS,
    accuracy_columns,
    calibrated_betas,
    have_intervals,
    head_places,
    head_statistics,
    position_rates,
    token_rows,
)
from act_export.profile.report.figures import (
    QUANTITIES,
    accuracy_points,
    attention_map,
    effect_scatter,
    head_heatmap,
    position_bars,
    position_layers,
)
from act_export.profile.report.theme import PAGE_COLOURS, RAMP_ON_DARK, RAMP_ON_LIGHT, page_config
from act_export.profile.report.token_text import visible_text
from act_export.profile.sink_profile import SinkProfile
from act_export.profile.sink_statistics import GRID, MODES, ExamplePrompt, Floats, SinkStatistics

TOKENS = 50
"""Rows of the table of sink tokens."""


def page_document(
    profile: SinkProfile, calibration: Calibration | None, accuracies: Sequence[TaskAccuracy]
) -> dict[str, Any]:
    """All that the script of the page draws.

    Arrays are `{"shape": [...], "float32": base64}`, little-endian, or `{"shape": [...], "shares": ...}` of
    `act_export.profile.report.attention_maps.encode_shares`.

    Args:
        profile: What to show.
        calibration: Whose heads to mark; None for none.
        accuracies: Of tasks.
    """
    statistics = [profile.overall, *profile.sources.values()]
    betas = calibrated_betas(calibration)
    maps = head_maps(profile, betas)
    return {
        "layers": profile.model.num_layers,
        "heads": profile.model.num_heads,
        "grid": GRID,
        "steps": STEPS,
        "ramps": {"light": RAMP_ON_LIGHT, "dark": RAMP_ON_DARK},
        "config": page_config(),
        "charts": _charts(accuracies),
        "quantities": [{"column": quantity.column, "title": quantity.title} for quantity in QUANTITIES],
        "places": head_places(profile.model, calibration),
        "sources": {each.name: _source(each, calibration, profile.model.num_heads) for each in statistics},
        "layer_maps": {each.name: _shares(layer_maps(each.mean_map)) for each in statistics},
        "head_maps": {
            "heads": maps.heads,
            "by_source": {
                name: {"shape": [len(maps.heads), GRID, GRID], "shares": encoded}
                for name, encoded in maps.by_source.items()
            },
        },
        "accuracy": accuracy_columns(accuracies) if accuracies else None,
        "examples": [_example(example, profile, calibration) for example in profile.examples],
    }


def ran_with(profile: SinkProfile, calibration: Calibration | None) -> bool:
    """Whether the profile's examples were run with this calibration, wherever it came from."""
    if calibration is None or profile.calibration is None:
        return False
    mine, its = (replace(each, provenance=None, model=None) for each in (calibration, profile.calibration))
    return mine == its


def _charts(accuracies: Sequence[TaskAccuracy]) -> dict[str, Any]:
    return {
        **{f"heads_{each.column}": head_heatmap(each, PAGE_COLOURS) for each in QUANTITIES},
        **{f"positions_{each}": position_bars(each, PAGE_COLOURS) for each in POSITIONS},
        **{f"layer_positions_{each}": position_layers(each, PAGE_COLOURS) for each in POSITIONS},
        "map": attention_map(PAGE_COLOURS),
        "effects": effect_scatter(PAGE_COLOURS),
        "accuracy": accuracy_points(PAGE_COLOURS, intervals=have_intervals(accuracies)),
    }


def _source(statistics: SinkStatistics, calibration: Calibration | None, num_heads: int) -> dict[str, Any]:
    return {
        "by": {mode: _by_mode(statistics, mode, calibration, num_heads) for mode in MODES},
        "effects": effect_facts(statistics) or None,
    }


def _by_mode(statistics: SinkStatistics, mode: str, calibration: Calibration | None, num_heads: int) -> dict[str, Any]:
    rates = {positions: position_rates(statistics, mode, positions) for positions in POSITIONS}
    return {
        "threshold": threshold_text(statistics.by[mode]),
        "tau": statistics.by[mode].threshold,
        "facts": key_facts(statistics, mode, calibration),
        "heads": {name: _floats(values) for name, values in head_statistics(statistics, mode).items()},
        "positions": {
            positions: {
                "start": _floats(each.starts),
                "end": _floats(each.ends),
                "range": each.ranges,
                "overall": _floats(each.overall),
                "by_layer": _floats(each.by_layer),
            }
            for positions, each in rates.items()
        },
        "tokens": token_rows(statistics, mode, num_heads, TOKENS),
    }


def _example(example: ExamplePrompt, profile: SinkProfile, calibration: Calibration | None) -> dict[str, Any]:
    after = example.calibrated_scores if ran_with(profile, calibration) else None
    heads = list(calibrated_betas(calibration))
    return {
        "source": example.source,
        "texts": [visible_text(text) for text in example.texts],
        "ids": [int(token) for token in example.ids],
        "before": _scores(example.scores, heads),
        "after": _scores(after, heads) if after is not None else None,
    }


def _scores(scores: Floats, heads: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Means over heads (.., tokens): of all, of the calibrated ones, of each layer."""
    found = {
        "all": _shares(scores.mean((0, 1), dtype=np.float64).astype(np.float32)),
        "layers": _shares(scores.mean(1, dtype=np.float64).astype(np.float32)),
    }
    if heads:
        chosen = np.stack([scores[place] for place in heads])
        found["calibrated"] = _shares(chosen.mean(0, dtype=np.float64).astype(np.float32))
    return found


def _floats(values: NDArray[Any]) -> dict[str, Any]:
    return {"shape": list(values.shape), "float32": base64.b64encode(values.astype("<f4").tobytes()).decode("ascii")}


def _shares(values: Floats) -> dict[str, Any]:
    return {"shape": list(values.shape), "shares": encode_shares(values)}
