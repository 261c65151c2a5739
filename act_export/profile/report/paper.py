"""The figures as files for a paper: on white, in the width of one column or two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import vl_convert

from act_export.calibration.file import Calibration
from act_export.errors import ActExportError
from act_export.files import write_whole
from act_export.profile.report.accuracy import TaskAccuracy
from act_export.profile.report.attention_maps import layer_maps, map_picture
from act_export.profile.report.figure_data import (
    POSITIONS,
    Columns,
    accuracy_columns,
    have_intervals,
    head_places,
    head_statistics,
    position_rates,
    rates_by_layer,
    rates_overall,
    rows_of,
)
from act_export.profile.report.figures import (
    QUANTITIES,
    Chart,
    accuracy_points,
    effect_scatter,
    head_heatmap,
    map_gallery,
    position_bars,
    position_layers,
)
from act_export.profile.report.theme import PAPER_COLOURS, RAMP_ON_LIGHT, paper_config
from act_export.profile.sink_profile import SinkProfile
from act_export.profile.sink_statistics import ABSOLUTE

FORMATS = ("png", "svg")
SINGLE_COLUMN, DOUBLE_COLUMN = 246, 510
"""Widths of what is drawn, in points of 1/72 inch."""

_DOTS_PER_INCH = 300
_MARGIN = 42  # left of a chart, for its labels


def write_figures(
    profile: SinkProfile,
    folder: Path,
    format: str,
    *,
    calibration: Calibration | None = None,
    accuracies: Sequence[TaskAccuracy] = (),
) -> list[Path]:
    """Writes the figures of a profile over all its prompts, sinks by the absolute threshold.

    Args:
        profile: What to show.
        folder: Where to; it is made.
        format: "png", 300 dots per inch, or "svg".
        calibration: Whose heads to mark; None for the profile's own, if it has one.
        accuracies: Of tasks; without any there is no figure of them.

    Returns:
        The files: sink-mass and attention-maps, sink-positions where a prompt has more than its initial token, and
        effects and accuracy where there are any.

    Raises:
        CalibrationError: If the calibration doesn't fit the model.
        ActExportError: If there is no such format, or a file can't be written.
    """
    if format not in FORMATS:
        raise ActExportError(f"there is no format {format!r}; pass {' or '.join(FORMATS)}")
    calibration = calibration if calibration is not None else profile.calibration
    if calibration is not None:
        calibration.check_fits(profile.model)
    written = []
    for name, chart in _charts(profile, calibration, accuracies).items():
        path = folder / f"{name}.{format}"
        try:
            write_whole(path, _drawn(chart, format))
        except OSError as error:
            raise ActExportError(f"can't write {path}: {error.strerror}; pass another folder") from error
        written.append(path)
    return written


def _charts(
    profile: SinkProfile, calibration: Calibration | None, accuracies: Sequence[TaskAccuracy]
) -> dict[str, Chart]:
    layers, heads = profile.model.num_layers, profile.model.num_heads
    columns: Columns = {**head_places(profile.model, calibration), **head_statistics(profile.overall, ABSOLUTE)}
    width = DOUBLE_COLUMN - _MARGIN
    cell = min(width / layers, 18.0)
    charts = {
        "sink-mass": _sized(
            _with(head_heatmap(QUANTITIES[0], PAPER_COLOURS), {"heads": columns}), cell * layers, cell * heads
        ),
        "attention-maps": _attention_maps(profile),
    }
    if profile.overall.longest > 1:
        charts["sink-positions"] = _positions(profile)
    if profile.overall.effects is not None:
        charts["effects"] = _sized(
            _with(effect_scatter(PAPER_COLOURS), {"heads": columns}), SINGLE_COLUMN - _MARGIN, 0.6 * SINGLE_COLUMN
        )
    if accuracies:
        chart = accuracy_points(PAPER_COLOURS, intervals=have_intervals(accuracies))
        chart = _with(chart, {"accuracy": accuracy_columns(accuracies)})
        charts["accuracy"] = _sized(chart, SINGLE_COLUMN - 2 * _MARGIN, 26 * len(accuracies))
    return charts


def _attention_maps(profile: SinkProfile) -> Chart:
    columns = min(10, profile.model.num_layers)
    size = (DOUBLE_COLUMN - 6 * (columns - 1)) / columns if columns > 5 else 80.0
    pictures = [map_picture(shares, RAMP_ON_LIGHT) for shares in layer_maps(profile.overall.mean_map)]
    table: Columns = {"layer": list(range(len(pictures))), "picture": pictures, "share": [0.0] * len(pictures)}
    return _with(map_gallery(columns, size), {"maps": table})


def _positions(profile: SinkProfile) -> Chart:
    width, height = DOUBLE_COLUMN / 2 - 1.4 * _MARGIN, 90.0
    parts, tables = [], {}
    for positions in POSITIONS:
        rates = position_rates(profile.overall, ABSOLUTE, positions)
        tables[f"positions_{positions}"] = rates_overall(rates)
        tables[f"layer_positions_{positions}"] = rates_by_layer(rates)
        bars = _sized(position_bars(positions, PAPER_COLOURS), width, height)
        layers = _sized(
            position_layers(positions, PAPER_COLOURS), width, min(8.0 * profile.model.num_layers, 3 * height)
        )
        parts.append({"vconcat": [bars, layers], "spacing": 14, "resolve": {"scale": {"x": "shared"}}})
    return _with({"hconcat": parts, "spacing": 16, "resolve": {"scale": {"color": "independent"}}}, tables)


def _with(chart: Chart, tables: Mapping[str, Columns]) -> Chart:
    return {**chart, "datasets": {name: rows_of(columns) for name, columns in tables.items()}}


def _sized(chart: Chart, width: float, height: float) -> Chart:
    return {**chart, "width": round(width, 1), "height": round(height, 1)}


def _drawn(chart: Chart, format: str) -> bytes:
    specification: dict[str, Any] = {**chart, "padding": 4}
    if format == "svg":
        drawn: str = vl_convert.vegalite_to_svg(specification, config=paper_config())
        return drawn.encode()
    picture: bytes = vl_convert.vegalite_to_png(specification, config=paper_config(), ppi=_DOTS_PER_INCH)
    return picture
