"""The parts of the page that the profile decides, as HTML: whatever comes from the profile is escaped."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from act_export.calibration.file import Calibration
from act_export.calibration.recipes import FORMER_RANKINGS
from act_export.profile.report.accuracy import TaskAccuracy
from act_export.profile.report.document import ran_with
from act_export.profile.report.facts import effect_facts, threshold_text
from act_export.profile.report.figure_data import accuracy_names, have_intervals
from act_export.profile.sink_profile import SinkProfile
from act_export.profile.sink_statistics import ALL, MODES, SinkStatistics

_NOTHING = "\N{EN DASH}"


def _method(calibration: Calibration | None) -> str | None:
    """How its heads were found, as it is called today."""
    if calibration is None or calibration.provenance is None:
        return None
    return FORMER_RANKINGS.get(calibration.provenance.method, calibration.provenance.method)


def summary(profile: SinkProfile) -> str:
    """The model and the prompts in one sentence; plain text."""
    model, overall = profile.model, profile.overall
    return (
        f"{model.num_layers} layers of {model.num_heads} heads ({model.architecture}), profiled on "
        f"{overall.prompts:,} prompts, {overall.tokens:,} tokens: {', '.join(profile.sources)}."
    )


def calibration_text(calibration: Calibration | None) -> str:
    """Which heads are marked, or how to get a calibration."""
    if calibration is None:
        return (
            "No head is marked as calibrated, because there is no calibration: <code>act-export search MODEL</code> "
            "finds one, and <code>act-export profile MODEL --calibration FILE</code> shows it."
        )
    count = calibration.num_calibrated_heads
    if not count:
        return "The calibration has no heads: none is marked."
    betas = sorted({beta for layer in calibration.heads for beta in _betas(calibration, layer)})
    beta = f"beta {betas[0]:g}" if len(betas) == 1 else f"beta {betas[0]:g} to {betas[-1]:g}"
    found = f", found by {_method(calibration)}" if calibration.provenance is not None else ""
    on = (
        f" on {', '.join(calibration.provenance.tasks)}"
        if calibration.provenance and calibration.provenance.tasks
        else ""
    )
    heads = "1 head is calibrated" if count == 1 else f"{count} heads are calibrated"
    threshold = f"{calibration.threshold_mode} threshold {calibration.threshold:g}"
    return html.escape(f"{heads} ({beta}, {threshold}{found}{on}).")


def _betas(calibration: Calibration, layer: int) -> tuple[float, ...]:
    share = calibration.layer(layer)
    return share.beta if share is not None else ()


def source_row(statistics: SinkStatistics) -> str:
    """A row of the table of prompts."""
    name = "all prompts" if statistics.name == ALL else statistics.name
    numbers = (statistics.prompts, statistics.tokens, statistics.shortest, statistics.longest)
    effects = f"{statistics.effect_prompts:,}" if statistics.effects is not None else _NOTHING
    return _row(name, [*(f"{number:,}" for number in numbers), effects])


def shared_beginnings(profile: SinkProfile) -> str:
    """Which prompts begin alike, so that what stands there leads the table; plain text."""
    alike = [
        f"those of {each.name} with the same {each.shared} tokens" for each in profile.sources.values() if each.shared
    ]
    if not alike:
        return ""
    return (
        f" Prompts begin alike, {', '.join(alike)}: what stands there is a sink in every prompt, whatever it is. The "
        f"column beside counts the rest of each prompt alone."
    )


def effects_section(profile: SinkProfile) -> str:
    """What stands under the heading of the effects, or how to measure them."""
    if profile.overall.effects is None:
        return (
            "  <p>Not measured: <code>act-export profile MODEL --task NAME</code> measures effects on the answers to a "
            "task.</p>"
        )
    facts = items(effect_facts(profile.overall))
    return f"""  <ul id="effect-facts" class="facts" aria-live="polite">
{facts}
  </ul>
  <figure aria-labelledby="effects-caption">
    <div class="chart" id="effects-chart"></div>
    <figcaption id="effects-caption">Each mark is one head: what calibrating it alone would change in the log-likelihood
    of the right answer, against its later-sink mass. Above the line its sinks hurt, below it they help.
    {_measured_at(profile)}</figcaption>
    <details data-numbers="effects"><summary>The effects as a table</summary></details>
  </figure>"""


def _measured_at(profile: SinkProfile) -> str:
    """At which beta and threshold effects are; HTML."""
    beta, threshold = (profile.options.get(f"effects_{name}") for name in ("beta", "threshold"))
    at = "the absolute threshold" + (f" of {_plain(threshold)}" if threshold is not None else "")
    scaled = f"Calibrated with beta {_plain(beta)}. " if beta is not None else ""
    return html.escape(f"{scaled}Effect and mass are both by {at}, whichever threshold is chosen above.")


def accuracy_section(accuracies: Sequence[TaskAccuracy]) -> str:
    """The section of accuracies; nothing where there are none."""
    if not accuracies:
        return ""
    rows = "\n".join(
        _row(
            name,
            [
                f"{each.samples:,}",
                f"{each.plain:.1%}",
                f"{each.calibrated:.1%}",
                f"{100 * each.gain:+.1f}",
                f"{100 * each.gain_interval[0]:+.1f} to {100 * each.gain_interval[1]:+.1f}"
                if each.gain_interval
                else _NOTHING,
                each.metric,
                each.measured_with,
            ],
        )
        for name, each in zip(accuracy_names(accuracies), accuracies, strict=True)
    )
    headings = "".join(
        f'<th scope="col" class="number">{heading}</th>'
        for heading in ("Questions", "Plain", "Calibrated", "Gain, points", "95% interval", "Metric", "Measured with")
    )
    return f"""
<section aria-labelledby="accuracy">
  <h2 id="accuracy">Accuracy</h2>
  <figure aria-labelledby="accuracy-caption">
    <div class="chart" id="accuracy-chart"></div>
    <figcaption id="accuracy-caption">{_accuracy_caption(accuracies)}</figcaption>
  </figure>
  <div class="scroll" role="region" tabindex="0" aria-label="Table of accuracies">
    <table>
      <caption>Accuracy by task</caption>
      <thead><tr><th scope="col">Task</th>{headings}</tr></thead>
      <tbody>
{rows}
      </tbody>
    </table>
  </div>
</section>
"""


def _accuracy_caption(accuracies: Sequence[TaskAccuracy]) -> str:
    text = "Accuracy without and with calibration on the same questions of the task, not those of this profile."
    if have_intervals(accuracies):
        text += " Lines are 95% intervals of each."
    if not all(each.plain_interval and each.calibrated_interval for each in accuracies):
        text += " A mean of tasks has an interval of its gain alone."
    text += " The interval of the gain, in the table, is paired"
    return text + (", and narrower than the lines suggest." if have_intervals(accuracies) else ".")


def prompts_section(profile: SinkProfile, calibration: Calibration | None) -> str:
    """What stands under the heading of the prompts."""
    if not profile.examples:
        return "  <p>The profile has no prompt short enough to show.</p>"
    examples = options({str(at): example.source for at, example in enumerate(profile.examples)})
    over = {"calibrated": "calibrated heads"} if calibration is not None and calibration.heads else {}
    over |= {"all": "all heads"} | {str(layer): f"layer {layer}" for layer in range(profile.model.num_layers)}
    if ran_with(profile, calibration) and all(example.calibrated_scores is not None for example in profile.examples):
        note = "Left as the model is, right with the calibration in place; later layers then see other inputs."
    elif profile.calibration is not None and not ran_with(profile, calibration):
        note = (
            "The prompts of the profile ran with another calibration, so this shows only the model as it is: "
            "<code>act-export profile MODEL --calibration FILE</code> runs them with this one."
        )
    else:
        note = (
            "Only the model as it is: <code>act-export profile MODEL --calibration FILE</code> also runs it calibrated."
        )
    return f"""  <p>Shading is the square root of a token&rsquo;s sink score, mean over the chosen heads. Tokens whose mean exceeds the
  threshold are underlined twice and carry their score. {note} Arrow keys move from token to token.</p>
  <p class="pick"><label>Prompt of <select id="example">{examples}</select></label>
  <label>Mean over <select id="over">{options(over)}</select></label></p>
  <div class="tokens-pair">
    <div id="before-part"><h3 id="before-title">Not calibrated</h3><div class="prompt" id="before" role="list" aria-labelledby="before-title"></div></div>
    <div id="after-part"><h3 id="after-title">Calibrated</h3><div class="prompt" id="after" role="list" aria-labelledby="after-title"></div></div>
  </div>"""  # noqa: E501


def how_made(profile: SinkProfile, calibration: Calibration | None) -> str:
    """Model, options and versions: the items of a description list."""
    made: dict[str, Any] = {
        "Model": f"{profile.model_name} ({profile.model.architecture})",
        "Weights": profile.model.fingerprint or "no fingerprint",
        "Thresholds": "; ".join(threshold_text(profile.overall.by[mode]) for mode in MODES),
        "Calibrated heads found by": _method(calibration),
    }
    made |= {name.replace("_", " "): value for name, value in profile.options.items() if name not in MODES}
    made |= {"Versions": ", ".join(f"{name} {version}" for name, version in profile.versions.items()) or None}
    return "\n".join(
        f"    <dt>{html.escape(str(name))}</dt><dd>{html.escape(_plain(value))}</dd>"
        for name, value in made.items()
        if value is not None
    )


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _row(heading: str, numbers: Iterable[str]) -> str:
    cells = "".join(f'<td class="number">{html.escape(number)}</td>' for number in numbers)
    return f'        <tr><th scope="row">{html.escape(heading)}</th>{cells}</tr>'


def items(sentences: Iterable[str]) -> str:
    """Items of a list, of plain text."""
    return "\n".join(f"    <li>{html.escape(sentence)}</li>" for sentence in sentences)


def options(names: Mapping[str, str]) -> str:
    """Options of a select element: value and plain text."""
    return "".join(f'<option value="{html.escape(key)}">{html.escape(name)}</option>' for key, name in names.items())
