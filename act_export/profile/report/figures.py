"""The charts, in Vega-Lite: one definition each, for the page and for files.

A chart names the table that it draws and the colours of the theme, and knows neither the numbers nor the size of the
page it is on: the page's script, or `act_export.profile.report.paper`, gives them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import altair as alt

from act_export.profile.report.figure_data import CALIBRATED, PLAIN

Chart = dict[str, Any]
Colours = Mapping[str, str]


@dataclass(frozen=True)
class Quantity:
    """Something that every head has a number of.

    Attributes:
        column: Of `act_export.profile.report.figure_data.head_statistics`.
        title: What it is called.
        format: d3's format of its numbers.
        scale: "sqrt" where most heads have little.
    """

    column: str
    title: str
    format: str
    scale: Literal["sqrt", "linear"]


QUANTITIES = (
    Quantity("mass", "Later-sink mass", ".2%", "sqrt"),
    Quantity("count", "Later sinks per prompt", ".2f", "sqrt"),
    Quantity("initial_score", "Initial sink score", ".3f", "linear"),
    Quantity("entropy", "Entropy of a row", ".2f", "linear"),
)
_SHORT = {".2%": ".0%", ".2f": "~g", ".3f": "~g"}  # in a legend
_STATUS = [PLAIN, CALIBRATED]


def head_heatmap(quantity: Quantity, colours: Colours) -> Chart:
    """Layers against heads, coloured by a quantity; calibrated heads carry a ring. Table "heads"."""
    base = alt.Chart(alt.NamedData("heads")).encode(
        x=alt.X("layer:O", title="Layer", axis=_band_axis()),
        y=alt.Y("head:O", title="Head", axis=_band_axis()),
        tooltip=[*_head_tooltip(), *(_tip(each.column, each.title, each.format) for each in QUANTITIES)],
    )
    cells = base.mark_rect(stroke=colours["page"], strokeWidth=0.5).encode(
        color=alt.Color(
            f"{quantity.column}:Q",
            scale=alt.Scale(type=quantity.scale, domainMin=0, interpolate="rgb"),
            legend=_ramp_legend(quantity.title, _SHORT[quantity.format]),
        )
    )
    rings = (
        base.transform_filter(alt.datum.status == CALIBRATED)
        .mark_point(filled=True, strokeWidth=2, opacity=1, aria=False, size=alt.ExprRef(_RING_SIZE))
        .encode(
            shape=alt.Shape("status:N", **_only("circle")),
            stroke=alt.Stroke("status:N", **_only(colours["accent"])),
            fill=alt.Fill("status:N", **_only(colours["page"])),
        )
    )
    return _specification(alt.layer(cells, rings).resolve_scale(color="independent"))


def attention_map(colours: Colours) -> Chart:
    """One mean attention map: queries downwards, keys to the right. Table "map"."""
    chart = (
        alt.Chart(alt.NamedData("map"))
        .mark_rect(stroke=colours["page"], strokeWidth=0.3)
        .encode(
            x=alt.X("key_start:Q", title="Key, % of the way through the prompt", axis=_way_axis(), scale=_WAY),
            x2="key_end:Q",
            y=alt.Y(
                "query_start:Q",
                title="Query, %",
                axis=_way_axis(),
                scale=alt.Scale(domain=[0, 100], nice=False, reverse=True),
            ),
            y2="query_end:Q",
            color=alt.Color("share:Q", scale=_SHARE, legend=_share_legend("Attention")),
            tooltip=[
                alt.Tooltip("queries:N", title="Queries"),
                alt.Tooltip("keys:N", title="Keys"),
                _tip("share", "Attention", ".2%"),
            ],
        )
    )
    return _specification(chart)


def map_gallery(columns: int, size: float) -> Chart:
    """Small multiples of maps, drawn as pictures. Table "maps": layer, picture, share."""
    layers = alt.layer(
        alt.Chart()
        .mark_image(width=size, height=size)
        .encode(x=alt.value(size / 2), y=alt.value(size / 2), url="picture:N"),
        alt.Chart()
        .mark_point(size=0, opacity=0)  # draws nothing, but brings the legend
        .encode(color=alt.Color("share:Q", scale=_SHARE, legend=_share_legend("Attention, mean over a layer's heads"))),
    ).properties(width=size, height=size)
    chart = layers.facet(
        facet=alt.Facet("layer:O", title=None),
        columns=columns,
        spacing=6,
        data=alt.NamedData("maps"),
    )
    return _specification(chart)


def position_bars(positions: str, colours: Colours) -> Chart:
    """Rate of later sinks by position, over all layers. Table "positions_{relative,absolute}"."""
    chart = (
        alt.Chart(alt.NamedData(f"positions_{positions}"))
        .mark_rect(fill=colours["series"], stroke=colours["page"], strokeWidth=0.5)
        .encode(
            x=_position_x(positions),
            x2="end:Q",
            y2=alt.datum(0),
            y=alt.Y(
                "rate:Q",
                title="Rate of later sinks",
                axis=alt.Axis(format=".1~%", tickCount=4, minExtent=_LEFT),
                scale=_FROM_ZERO,
            ),
            tooltip=_position_tooltip(),
        )
    )
    return _specification(chart)


def position_layers(positions: str, colours: Colours) -> Chart:
    """The same by layer. Table "layer_positions_{relative,absolute}"."""
    chart = (
        alt.Chart(alt.NamedData(f"layer_positions_{positions}"))
        .mark_rect(stroke=colours["page"], strokeWidth=0.3)
        .encode(
            x=_position_x(positions),
            x2="end:Q",
            y=alt.Y("layer:O", title="Layer", axis=_band_axis(minExtent=_LEFT)),
            color=alt.Color(
                "rate:Q",
                scale=alt.Scale(type="sqrt", domainMin=0, interpolate="rgb"),
                legend=_ramp_legend("Rate of later sinks", ".1~%"),
            ),
            tooltip=[alt.Tooltip("layer:O", title="Layer"), *_position_tooltip()],
        )
    )
    return _specification(chart)


def effect_scatter(colours: Colours) -> Chart:
    """Effect of calibrating each head alone against its later-sink mass. Table "heads", by the absolute threshold."""
    points = (
        alt.Chart(alt.NamedData("heads"))
        .mark_point(filled=True, size=42, opacity=0.85, strokeWidth=1)
        .encode(
            x=alt.X(
                "mass:Q",
                title="Later-sink mass",
                axis=alt.Axis(format=".1~%", grid=False, tickCount=5),
                scale=alt.Scale(type="sqrt", domainMin=0),
            ),
            y=alt.Y("effect:Q", title="Effect on log-likelihood", axis=alt.Axis(format="~g", tickCount=5)),
            fill=alt.Fill("status:N", **_two(_STATUS, "transparent", colours["accent"])),
            stroke=alt.Stroke("status:N", **_two(_STATUS, colours["series"], colours["accent"])),
            shape=alt.Shape("status:N", **_two(_STATUS, "circle", "diamond")),
            tooltip=[*_head_tooltip(), _tip("mass", "Later-sink mass", ".2%"), _tip("effect", "Effect", "+.5f")],
        )
    )
    zero = alt.Chart().mark_rule(color=colours["ink"], strokeWidth=1, aria=False).encode(y=alt.datum(0))
    return _specification(alt.layer(zero, points, data=alt.NamedData("heads")))


def accuracy_points(colours: Colours, *, intervals: bool) -> Chart:
    """Accuracies, plain above calibrated, with the intervals of those that have one. Table "accuracy".

    Args:
        colours: By name.
        intervals: Whether any has one.
    """
    models = ["plain", "calibrated"]
    title = "Accuracy, 95% interval" if intervals else "Accuracy"
    base = alt.Chart(alt.NamedData("accuracy")).encode(
        y=alt.Y("task:N", title=None, sort=None, axis=alt.Axis(domain=False, ticks=False, grid=False, labelLimit=220)),
        yOffset=alt.YOffset("model:N", sort=models),
        stroke=alt.Stroke("model:N", **_two(models, colours["ink"], colours["accent"])),
        tooltip=[
            alt.Tooltip("task:N", title="Task"),
            alt.Tooltip("model:N", title="Model"),
            _tip("value", "Accuracy", ".1%"),
            alt.Tooltip("interval:N", title="95% interval"),
        ],
    )
    shared: dict[str, Any] = {
        "title": title,
        "axis": alt.Axis(format=".0%", tickCount=6),
        "scale": alt.Scale(zero=False, nice=True),
    }
    points = base.mark_point(filled=True, size=50, opacity=1, strokeWidth=1.5).encode(
        x=alt.X("value:Q", **shared),
        fill=alt.Fill("model:N", **_two(models, colours["page"], colours["accent"])),
        shape=alt.Shape("model:N", **_two(models, "circle", "diamond")),
    )
    if not intervals:
        return _specification(points)
    lines = base.transform_filter(alt.expr.isValid(alt.datum.low)).mark_rule(strokeWidth=1.5, aria=False)
    return _specification(alt.layer(lines.encode(x=alt.X("low:Q", **shared), x2="high:Q"), points))


_LEFT = 34  # of labels: charts one above the other begin at the same place
_RING_SIZE = "max(12, 0.28 * pow(min(bandwidth('x'), bandwidth('y')), 2))"
_WAY = alt.Scale(domain=[0, 100], nice=False)
_SHARE = alt.Scale(type="sqrt", domain=[0, 1], interpolate="rgb")
_FROM_ZERO = alt.Scale(domainMin=0)


def _specification(chart: alt.TopLevelMixin) -> Chart:
    found: Chart = chart.to_dict()
    found.pop("config", None)  # altair's own look; the theme has another
    found.pop("$schema", None)  # an address, and nothing reads it
    return found


def _head_tooltip() -> list[alt.Tooltip]:
    return [
        alt.Tooltip("layer:O", title="Layer"),
        alt.Tooltip("head:O", title="Head"),
        alt.Tooltip("status:N", title="Calibration"),
        alt.Tooltip("beta:N", title="Beta"),
    ]


def _position_tooltip() -> list[alt.Tooltip]:
    return [alt.Tooltip("range:N", title="Position"), _tip("rate", "Rate of later sinks", ".3%")]


def _tip(column: str, title: str, form: str) -> alt.Tooltip:
    return alt.Tooltip(f"{column}:Q", title=title, format=form)


def _position_x(positions: str) -> alt.X:
    if positions == "relative":
        return alt.X("start:Q", title="Position, % of the way through the prompt", axis=_way_axis(), scale=_WAY)
    return alt.X(
        "start:Q",
        title="Position, tokens (log scale)",
        axis=alt.Axis(grid=False, format="~s", labelOverlap=True, values=[1 << shift for shift in range(0, 22, 2)]),
        scale=alt.Scale(type="log", base=2, nice=False),
    )


def _two(domain: list[str], first: str, second: str) -> dict[str, Any]:
    """What the arguments of several channels have in common, so that they share one legend."""
    return {
        "scale": alt.Scale(domain=domain, range=[first, second]),
        "legend": alt.Legend(title=None, orient="top"),
        "sort": domain,
    }


def _only(value: str) -> dict[str, Any]:
    return {"scale": alt.Scale(domain=[CALIBRATED], range=[value]), "legend": alt.Legend(title=None, orient="top")}


def _band_axis(**more: Any) -> alt.Axis:
    return alt.Axis(labelAngle=0, labelOverlap=True, ticks=False, domain=False, **more)


def _way_axis() -> alt.Axis:
    return alt.Axis(grid=False, values=[0, 25, 50, 75, 100])


def _share_legend(title: str) -> alt.Legend:
    return alt.Legend(
        title=title,
        format=".0%",
        values=[0, 0.01, 0.1, 0.25, 0.5, 1],
        orient="top",
        direction="horizontal",
        gradientThickness=8,
    )


def _ramp_legend(title: str, form: str) -> alt.Legend:
    return alt.Legend(title=title, format=form, orient="top", direction="horizontal", gradientThickness=8, tickCount=4)
