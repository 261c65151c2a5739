"""Draws what the shipped recipes gain, as act_export/docs/gains-light.svg and gains-dark.svg, from the recipes alone.

    .venv/bin/python tools/bench/draw_gains.py

Of each recipe that a search of act-export wrote: accuracy of the plain model, of the plain model with its mean
preference for an answer taken off (the cheap remedy), and calibrated, with the 95% interval of the gain over plain.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

import act_export
from act_export.calibration.file import Calibration
from act_export.commands.console import run_program
from act_export.profile.report.theme import PAPER_COLOURS, chart_config

ROOT = Path(__file__).parent.parent.parent
OUT = Path(act_export.__file__).parent / "docs"
PLAIN, REMEDY, CALIBRATED = "plain", "plain, lean taken off", "calibrated"
LIGHT = {**PAPER_COLOURS, "plain": "#b3b9c1", "remedy": "#7fa8d0"}
DARK = {
    **{"ink": "#e8eaed", "muted": "#a9b0b8", "line": "#3a4048", "page": "#0d1117", "accent": "#f0794a"},
    **{"series": "#53bec9", "plain": "#5b626b", "remedy": "#3f7d9e"},
}


def rows_of(recipe: Path) -> list[dict[str, Any]]:
    """One for each bar; none where the recipe wasn't measured by act-export."""
    origin = Calibration.load(recipe).provenance
    if origin is None or "controls" not in origin.notes:
        return []
    plain, calibrated = origin.plain_accuracy, origin.calibrated_accuracy
    assert plain is not None
    assert calibrated is not None
    low, high = origin.notes["gain_interval_95"]
    name = f"{recipe.stem} on {', '.join(origin.tasks)}"
    values = (
        (PLAIN, plain, None, None),
        (REMEDY, origin.notes["controls"]["without_choice_bias"]["plain"], None, None),
        (CALIBRATED, calibrated, plain + low, plain + high),
    )
    return [
        {"recipe": name, "model": model, "accuracy": value, "low": start, "high": end}
        for model, value, start, end in values
    ]


def chart(rows: list[dict[str, Any]], colours: dict[str, str]) -> alt.LayerChart:
    """Bars by recipe and model."""
    order = [PLAIN, REMEDY, CALIBRATED]
    base = alt.Chart(alt.Data(values=rows))
    place = alt.Y("model:N", sort=order, axis=None)
    bars = base.mark_bar(height=15).encode(
        x=alt.X("accuracy:Q", title="accuracy on questions that took no part in the search", axis=alt.Axis(format="%")),
        y=place,
        color=alt.Color(
            "model:N",
            title=None,
            scale=alt.Scale(domain=order, range=[colours["plain"], colours["remedy"], colours["series"]]),
            legend=alt.Legend(orient="top", symbolStrokeWidth=0, columnPadding=28),
        ),
    )
    intervals = base.mark_rule(color=colours["ink"], strokeWidth=1.5).encode(x="low:Q", x2="high:Q", y=place)
    texts = base.mark_text(align="left", dx=4, color=colours["ink"], fontSize=11).encode(
        x=alt.X("label:Q"), y=place, text=alt.Text("accuracy:Q", format=".1%")
    )
    header = alt.Header(labelAngle=0, labelOrient="top", labelAnchor="start")
    return (
        alt.layer(bars, intervals, texts.transform_calculate(label="max(datum.accuracy, datum.high || 0)"))
        .properties(width=430, height=66)
        .facet(row=alt.Row("recipe:N", title=None, header=header))
    )


def main() -> None:
    rows = [row for recipe in sorted((ROOT / "models").glob("*.json")) for row in rows_of(recipe)]
    for name, colours in (("light", LIGHT), ("dark", DARK)):
        config = chart_config(colours, font="Helvetica, Arial, sans-serif", text_size=12)
        header = {"labelColor": colours["ink"], "labelFontSize": 12}
        drawn = vl_convert.vegalite_to_svg(chart(rows, colours).to_dict(), config={**config, "header": header})
        path = OUT / f"gains-{name}.svg"
        path.write_text(drawn + "\n", encoding="utf-8")
        print(path)


if __name__ == "__main__":
    run_program(main)
