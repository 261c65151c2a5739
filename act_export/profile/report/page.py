"""The page: one HTML file with its data, style, script and plotting library, which asks the network for nothing."""

from __future__ import annotations

import functools
import html
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from string import Template

import vl_convert

from act_export.calibration.file import Calibration
from act_export.errors import ActExportError
from act_export.files import write_whole
from act_export.html_page import as_json, as_script, script_hash
from act_export.profile.report.accuracy import TaskAccuracy
from act_export.profile.report.answers import answers_section
from act_export.profile.report.document import TOKENS, page_document
from act_export.profile.report.facts import key_facts, threshold_text
from act_export.profile.report.figures import QUANTITIES
from act_export.profile.report.sections import (
    accuracy_section,
    calibration_text,
    effects_section,
    how_made,
    items,
    options,
    prompts_section,
    shared_beginnings,
    source_row,
    summary,
)
from act_export.profile.report.verdict import verdict_section
from act_export.profile.sink_profile import SinkProfile
from act_export.profile.sink_statistics import ABSOLUTE, ALL, GRID, MODES, RELATIVE

_MODE_NAMES = {ABSOLUTE: "absolute", RELATIVE: "relative to length"}
_SCRIPTS = ("page_parts.js", "page_charts.js", "page_maps.js", "page.js")


def write_report(
    profile: SinkProfile,
    out: Path,
    *,
    calibration: Calibration | None = None,
    accuracies: Sequence[TaskAccuracy] = (),
) -> None:
    """Writes the report of a profile, one HTML file that opens from disk.

    Args:
        profile: What to show.
        out: The file, written whole or not at all.
        calibration: Whose heads to mark; None for the profile's own, if it has one.
        accuracies: Of tasks, see `act_export.profile.report.accuracies_of`; without any there is no such section.

    Raises:
        CalibrationError: If the calibration doesn't fit the model.
        ActExportError: If the file can't be written.
    """
    calibration = calibration if calibration is not None else profile.calibration
    if calibration is not None:
        calibration.check_fits(profile.model)
    try:
        write_whole(out, report_html(profile, calibration, accuracies))
    except OSError as error:
        raise ActExportError(f"can't write {out}: {error.strerror}; pass another place with --out") from error


def report_html(profile: SinkProfile, calibration: Calibration | None, accuracies: Sequence[TaskAccuracy]) -> str:
    """The page's text.

    Args:
        profile: What to show.
        calibration: Whose heads to mark; None for none.
        accuracies: Of tasks.
    """
    bundle, script = plotting_library(), as_script(_script())
    overall = profile.overall
    answers = answers_section(profile, calibration)
    shown = [*profile.sources.values(), *([overall] if len(profile.sources) > 1 else [])]
    return Template(_part("page.html")).substitute(
        model=html.escape(profile.model_name),
        summary=html.escape(summary(profile)),
        script_hashes=" ".join(map(script_hash, (bundle, script))),
        style=_part("page.css"),
        bundle=bundle,
        script=script,
        data=as_json(page_document(profile, calibration, accuracies)),
        grid=GRID,
        token_limit=TOKENS,
        shared=html.escape(shared_beginnings(profile)),
        threshold=html.escape(threshold_text(overall.by[ABSOLUTE])),
        facts=items(key_facts(overall, ABSOLUTE, calibration)),
        verdict=verdict_section(calibration, profile.model_name),
        calibration=calibration_text(calibration),
        ring_note=" A ring marks a calibrated head." if calibration is not None and calibration.heads else "",
        source_options=options(_sources(profile)),
        mode_options=options({mode: _MODE_NAMES[mode] for mode in MODES}),
        quantity_options=options({each.column: each.title for each in QUANTITIES}),
        layer_options=options({str(layer): str(layer) for layer in range(profile.model.num_layers)}),
        source_rows="\n".join(source_row(each) for each in shown),
        effects=effects_section(profile),
        accuracy_link='<li><a href="#accuracy">Accuracy</a></li>' if accuracies else "",
        accuracy=accuracy_section(accuracies),
        answers_link='<li><a href="#answers">Answers</a></li>' if answers else "",
        answers=answers,
        prompts=prompts_section(profile, calibration),
        made=how_made(profile, calibration),
    )


def _sources(profile: SinkProfile) -> dict[str, str]:
    """What can be chosen: each source, and all together where there are several."""
    if len(profile.sources) == 1:
        return {ALL: next(iter(profile.sources))}
    return {ALL: "all prompts"} | {name: name for name in profile.sources}


@functools.cache
def plotting_library() -> str:
    """Vega, Vega-Lite and vega-embed as the page's script: it sets `vegaEmbed`, and nothing else is seen of it."""
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return as_script(f"(() => {{{bundle}}})();")


def _script() -> str:
    """The page's own script, in a scope of its own."""
    return '"use strict";\n(() => {\n' + "\n".join(map(_part, _SCRIPTS)) + "})();\n"


def _part(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
