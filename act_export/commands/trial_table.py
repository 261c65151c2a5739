"""What `act-export try` prints: a table, and a verdict in plain words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from act_export.commands.printing import PlainConsole, PlainTable
from act_export.version import __version__

if TYPE_CHECKING:
    from act_export.search.trial import Elsewhere, Trial
    from act_export.search.trial_data import TrialData

FORMAT = "act-export trial"
FORMAT_VERSION = 1
_REMEDIES = {
    "choices only": "allow no other first token than an answer's",
    "label prior": "take from each answer's log-probability that after the same prompt with N/A for its content",
    "choice bias": "take from each answer's log-probability its mean over other questions; needs no right answers",
    "offsets": "add an offset to each answer's log-probability",
}


def trial_json(data: TrialData, trial: Trial, cost: Elsewhere | None) -> str:
    """Every figure; the keys are those of the documentation and stay."""
    figures = asdict(trial)
    del figures["calibration"]
    document = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "act_export": __version__,
        "questions": {
            "name": data.name,
            "different": data.different,
            "reported": data.reported,
            "recommended": data.recommended,
            "detectable_gain": round(data.detectable, 4),
            "chance": data.chance,
            "searches": len(data.searches),
        },
        "verdict": trial.verdict,
        **figures,
        "heads": trial.calibration.num_calibrated_heads if trial.calibration is not None else 0,
        "elsewhere": {**asdict(cost), "lost": cost.lost} if cost is not None else None,
    }
    return json.dumps(document, indent=1)


def print_trial(data: TrialData, trial: Trial, cost: Elsewhere | None, *, model: str, source: str, file: str) -> None:
    """Prints what was measured and what to do.

    Args:
        data: The questions.
        trial: What the searches came to.
        cost: What the calibration costs on other questions; None where it wasn't measured.
        model: As it was given.
        source: The option that names the questions.
        file: Of the calibration.
    """
    table = PlainTable(title=f"{data.name}: {data.reported} questions that took no part in their search")
    for column in ("model", "accuracy", "gain over plain, 95% interval"):
        table.add_column(column, justify="left" if column == "model" else "right")
    table.add_row("plain", f"{trial.plain:.1%}", "")
    for name, gain in trial.remedies.items():
        table.add_row(f"plain, {name}", f"{gain.accuracy:.1%}", gain.points)
    table.add_row("calibrated", f"{trial.calibrated.accuracy:.1%}", trial.calibrated.points)
    console = PlainConsole()
    console.print(table)
    for line in (*_facts(data, trial, cost), *_verdict(data, trial, cost, model=model, source=source, file=file)):
        console.say(line)


def _facts(data: TrialData, trial: Trial, cost: Elsewhere | None) -> Iterator[str]:
    if trial.at_chance:
        chance = f"{trial.plain:.1%}, and {data.chance:.1%} is right without reading the questions."
        if trial.leans:
            yield f"The plain model answers as if it guessed: {chance} What gains shows that it knows more than that."
        else:
            yield (
                f"The plain model may be guessing: {chance} Another wording, --shots, --chat or another --scoring may "
                f"do more than any calibration."
            )
    yield f"{trial.found} of {len(data.searches)} searches found heads to calibrate."
    if trial.found and trial.remedies:
        yield f"Beyond the best of the others, {_named(trial.remedy)}: {trial.beyond.points}."
    if cost is None:
        return
    for name, gain in cost.tasks.items():
        yield f"Elsewhere, {name}: {gain.points}{' - lost beyond luck' if name in cost.lost else ''}."
    if cost.text is not None:
        lost = " - lost beyond luck" if "text" in cost.lost else ""
        yield f"Elsewhere, perplexity of a text: {cost.text.plain:.2f} -> {cost.text.calibrated[0]:.2f}{lost}."
    yield from cost.missing


def _verdict(
    data: TrialData, trial: Trial, cost: Elsewhere | None, *, model: str, source: str, file: str
) -> Iterator[str]:
    export = f"  act-export {model} --calibration {file} --out calibrated.onnx"
    gain, verdict = trial.calibrated.points, trial.verdict
    yield ""
    if verdict == "calibrate":
        yield f"Verdict: calibrate. It gains {gain}, more than any cheaper remedy that was tried."
    elif verdict == "remedy":
        yield (
            f"Verdict: {_named(trial.remedy)} does it, without calibration: {trial.remedies[trial.remedy].points}. "
            f"That calibration gains more than that isn't shown."
        )
        yield f"To use it, {_REMEDIES[trial.remedy]}."
        if trial.remedy == "offsets":
            yield "Fitted on all questions: " + ", ".join(f"{text!r} {by:+.2f}" for text, by in trial.offsets.items())
        if not trial.found:
            yield f"No calibration was found: {file} isn't written."
        elif trial.calibrated.interval[0] > 0:
            yield "Where scores can't be changed, calibration is the other way:"
            yield export
        yield "Whether calibration adds to it:"
        yield f"  act-export search {model} {source} --goal beyond-remedy"
        return
    elif verdict == "either":
        yield f"Verdict: calibration helps, {gain}; that it does more than {_named(trial.remedy)} isn't shown."
    elif verdict == "plain":
        yield "Verdict: leave the model as it is. " + (
            f"Calibration gained {gain}."
            if trial.found
            else "No calibration gained more than luck explains on the questions that it was chosen with."
        )
    else:
        yield f"Verdict: undecided. Calibration gains {gain}; these questions can't tell that from luck."
    if not trial.found:
        yield f"So {file} isn't written."
    if verdict in ("plain", "undecided") and data.different < data.recommended:
        yield (
            f"A gain below about {100 * data.detectable:.0f} points would not have been seen; more questions show "
            f"smaller ones ({data.recommended} are recommended)."
        )
    if cost is not None and cost.lost:
        yield f"It costs elsewhere ({', '.join(cost.lost)}): use it for requests of this kind alone, by its name."
    if verdict in ("calibrate", "either"):
        yield "Next:"
        yield export
    elif verdict == "undecided":
        yield "Next: the same with more questions, or all methods by themselves:"
        yield f"  act-export search {model} {source} --method act,gamma,fit"


def _named(remedy: str) -> str:
    return "the plain model" if remedy == "plain" else remedy
