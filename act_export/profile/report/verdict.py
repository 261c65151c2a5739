"""What stands on top of the page: whether the calibration helps, beyond what, at which cost, and how to use it."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from typing import Any

from act_export.calibration.file import Calibration, Provenance
from act_export.calibration.recipes import shipped_recipes
from act_export.calibration.search_notes import (
    Interval,
    gain_beyond_control,
    gain_interval,
    gain_with_remedy,
    without_choice_bias,
)
from act_export.tasks import DEFAULT_TASK

_NO_CALIBRATION = (
    "Whether calibration helps this model isn't known here. This asks, on your own questions:",
    "act-export try {model} --data questions.jsonl",
)


def verdict_section(calibration: Calibration | None, model: str) -> str:
    """The section; HTML.

    Args:
        calibration: With its provenance, if it was measured; None where the profile has none.
        model: What MODEL was called.
    """
    if calibration is None or not calibration.heads:
        line, command = _NO_CALIBRATION
        return _section(f"<p>{html.escape(line)}</p>", [], command.format(model=model))
    origin = calibration.provenance
    if origin is None or origin.plain_accuracy is None or origin.calibrated_accuracy is None:
        lead = "<p>What this calibration gains was never measured. In a file that has it, this does:</p>"
        return _section(lead, [], f"act-export eval calibrated.onnx --task {_task(origin)}")
    gain = 100 * (origin.calibrated_accuracy - origin.plain_accuracy)
    interval = gain_interval(origin.notes)
    gained = f"<strong>{gain:+.1f} points</strong>" + (f" ({_interval(interval)})" if interval is not None else "")
    asked = f"{origin.samples.get('report', 0):,} questions of {html.escape(', '.join(origin.tasks))}"
    lead = (
        f'<p class="lead">{gained} on {asked} that took no part in its search: {origin.plain_accuracy:.1%} plain, '
        f"{origin.calibrated_accuracy:.1%} calibrated.</p>"
    )
    known = (recipe.name for recipe in shipped_recipes() if recipe.calibration.heads == calibration.heads)
    command = f"act-export {model} --calibration {next(known, 'FILE.json')} --out calibrated.onnx"
    return _section(lead, list(_remarks(origin.notes, origin.seed)), command)


def _remarks(notes: Mapping[str, Any], seed: int | None) -> Iterator[str]:
    beyond = _beyond(notes)
    if beyond:
        yield beyond
    if seed is not None:
        yield f"Found with one draw of questions (seed {seed})."
    yield "Measured then, not on the prompts of this page: act-export try does it on your own questions."
    costs = notes.get("by_name_only")
    yield f"Elsewhere: {costs}." if costs else "What it costs on other tasks and texts isn't recorded."


def _beyond(notes: Mapping[str, Any]) -> str:
    """What is gained beyond cheap remedies; empty where the notes don't say."""
    beyond = gain_beyond_control(notes)
    if beyond is not None and beyond.interval is not None:
        accuracy = "" if beyond.accuracy is None else f" ({beyond.accuracy:.1%})"
        of = f", {beyond.control}{accuracy}" if beyond.control else " of each task"
        gained = f"{100 * beyond.gain:+.1f} points ({_interval(beyond.interval)})"
        added = gain_with_remedy(notes)
        if added is not None and added.interval is not None and added.control != "plain":
            gained += f"; with that remedy on both models {100 * added.gain:+.1f} ({_interval(added.interval)})"
        lower = max(each.interval[0] for each in (beyond, added) if each is not None and each.interval is not None)
        shown = "" if lower > 0 else " That calibration adds anything isn't shown."
        return f"Beyond the best cheap remedy{of}: {gained}.{shown}"
    if (unbiased := without_choice_bias(notes)) is not None:
        plain, calibrated = unbiased
        return (
            f"With each model's lean to an answer taken off: {plain:.1%} plain, {calibrated:.1%} calibrated. The rest "
            f"of the gain is the lean, which is cheaper to take off."
        )
    return ""


def _section(lead: str, remarks: list[str], command: str) -> str:
    items = "".join(f"\n    <li>{html.escape(remark)}</li>" for remark in remarks)
    return f"""<section aria-labelledby="verdict">
  <h2 id="verdict">Verdict</h2>
  {lead}
  <ul class="facts">{items}
  </ul>
  <p class="command"><code id="command">{html.escape(command)}</code> <button type="button" id="copy">Copy</button></p>
</section>
"""


def _interval(bounds: Interval) -> str:
    return f"{100 * bounds[0]:+.1f} to {100 * bounds[1]:+.1f}"


def _task(origin: Provenance | None) -> str:
    return origin.tasks[0] if origin is not None and origin.tasks else DEFAULT_TASK
