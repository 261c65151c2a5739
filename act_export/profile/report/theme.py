"""Colours and type of the figures: one theme follows the page's CSS, the other is for paper."""

from __future__ import annotations

from typing import Any

RAMP_ON_LIGHT = (
    "#ebf6f4",
    "#bde6e5",
    "#8dd4dc",
    "#60bfd6",
    "#39a9ce",
    "#2290c3",
    "#2376b3",
    "#2b5e9c",
    "#2f4780",
    "#2c3361",
    "#242142",
)
"""From none to most, even steps of lightness in OKLab: from a light page to dark blue."""

RAMP_ON_DARK = (
    "#1d2130",
    "#253250",
    "#26466f",
    "#1e5d8c",
    "#0875a3",
    "#088eb3",
    "#26a7c1",
    "#53bec9",
    "#81d3d2",
    "#b0e6de",
    "#dcf7ef",
)
"""The same for a dark page: none is dark, most is light."""

PAPER_COLOURS = {
    "ink": "#1a1d21",
    "muted": "#565c64",
    "line": "#d5d8dc",
    "page": "#ffffff",
    "accent": "#b8400f",
    "series": "#2376b3",
}
"""The colours that figures name, for a white sheet."""

PAGE_COLOURS = {name: f"var(--{name})" for name in PAPER_COLOURS}
"""The same colours as the page's style sheet has them, in the theme in use."""

_SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_PAPER_SANS = "Liberation Sans, Helvetica, Arial, sans-serif"


def chart_config(colours: dict[str, str], *, font: str, text_size: float) -> dict[str, Any]:
    """Vega-Lite's configuration, by which a chart takes on a theme.

    Args:
        colours: By name, as `PAPER_COLOURS`.
        font: CSS font family.
        text_size: Of labels, in pixels.
    """
    text = {
        "labelColor": colours["muted"],
        "titleColor": colours["ink"],
        "labelFont": font,
        "titleFont": font,
        "labelFontSize": text_size,
        "titleFontSize": text_size,
        "titleFontWeight": "normal",
    }
    return {
        "background": None,
        "font": font,
        "view": {"stroke": None},
        "axis": {
            **text,
            "domainColor": colours["muted"],
            "tickColor": colours["muted"],
            "gridColor": colours["line"],
            "tickSize": 3,
            "labelPadding": 3,
            "titlePadding": 6,
        },
        "legend": {
            **text,
            "symbolStrokeColor": colours["ink"],
            "gradientStrokeColor": None,
            "offset": 6,
            "rowPadding": 2,
            "titlePadding": 3,
        },
        "header": {**text, "labelPadding": 2},
        "title": {"color": colours["ink"], "font": font, "fontSize": text_size, "fontWeight": "normal"},
    }


def page_config() -> dict[str, Any]:
    """For the page: its CSS variables give the colours, and the script adds the ramp of the theme in use."""
    return chart_config(PAGE_COLOURS, font=_SANS, text_size=12)


def paper_config() -> dict[str, Any]:
    """For files: dark on white, in the size of a paper's captions."""
    return {
        **chart_config(PAPER_COLOURS, font=_PAPER_SANS, text_size=8),
        "background": "#ffffff",
        "range": {"heatmap": list(RAMP_ON_LIGHT), "ramp": list(RAMP_ON_LIGHT)},
    }
