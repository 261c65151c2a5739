"""What a calibration says of where it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
import transformers

from act_export.calibration.file import Calibration, Provenance
from act_export.checkpoint.load import Checkpoint
from act_export.search.answers import CHOOSE, RANK, REPORT
from act_export.search.choose import Choice
from act_export.search.request import SearchOptions, SearchTask
from act_export.search.results import NO_AVERAGES, Averages, Gain, TaskReport
from act_export.tasks import question_digests
from act_export.version import __version__

_AVERAGES = ("average_gain", "average_gain_beyond_controls", "average_gain_with_remedies_on_both")


def search_provenance(
    checkpoint: Checkpoint,
    calibration: Calibration,
    choice: Choice,
    tasks: Sequence[SearchTask],
    reports: Sequence[TaskReport],
    gains: Sequence[Gain | None],
    *,
    options: SearchOptions,
    averages: Averages = NO_AVERAGES,
) -> Provenance:
    """The record of a search.

    Args:
        checkpoint: The model.
        calibration: What was found.
        choice: How it was chosen.
        tasks: What it was found on.
        reports: By task.
        gains: By task, on questions that took no part; None where no set helped.
        options: How it was searched.
        averages: Where the set was found on several tasks together.
    """
    asked, chosen = tasks[0].questions, choice.chosen.proposal
    used = {digest for t in tasks for e in (*t.splits.rank, *t.splits.choose) for digest in question_digests(e)}
    accuracies = [
        gain.accuracy if gain is not None else report.plain_accuracy
        for gain, report in zip(gains, reports, strict=True)
    ]
    notes: dict[str, Any] = {
        "choose_accuracy": tried(choice),
        "choose_p": round(choice.p, 4),
        "ranking": options.ranking,
        "ranking_forward_passes": round(sum(report.forward_passes for report in reports), 1),
        "dtype": str(checkpoint.model.dtype).removeprefix("torch."),
        "questions": {
            "scoring": asked.scoring or "the task's own",
            "shots": asked.shots,
            "chat": asked.chat,
            "truncate": asked.truncate,
        },
    }
    if options.goal != "accuracy":
        notes["goal"] = options.goal
        notes["choose_log_likelihood_with_remedy"] = tried(choice, by_worth=True)
    if chosen is not None and chosen.method == "fit":
        notes["fit"] = {"l1": options.fit_l1, "l2": list(options.fit_l2)}
    if checkpoint.weights:
        notes["weights"] = checkpoint.weights
    if model := hub_model(checkpoint):
        notes["model"] = model
    if not calibration.heads:
        notes["result"] = "no head is calibrated: nothing tried gained more on the choose split than luck explains"
    elif any(averages):
        for name, average in zip(_AVERAGES, filter(None, averages), strict=True):
            notes[name] = {"gain": average.gain, "interval_95": list(average.interval)}
        notes["controls"] = {report.task: dict(report.controls) for report in reports}
        notes["gains"] = {
            report.task: [gain.gain, *gain.interval] for gain, report in zip(gains, reports, strict=True) if gain
        }
    else:
        notes |= _gain_notes(reports[0])
    return Provenance(
        method=chosen.method if chosen is not None else ",".join(methods_tried(choice)),
        tasks=tuple(task.name for task in tasks),
        samples={name: sum(report.sizes[name] for report in reports) for name in (RANK, CHOOSE, REPORT)},
        seed=asked.drawing_seed,
        plain_accuracy=round(sum(report.plain_accuracy for report in reports) / len(reports), 4),
        calibrated_accuracy=round(sum(accuracies) / len(accuracies), 4),
        versions=package_versions(),
        notes={**notes, "used": sorted(used)},
    )


def hub_model(checkpoint: Checkpoint) -> dict[str, str]:
    """What makes a search reproducible: hub id and commit; empty where the model isn't from the hub."""
    name = next((name for name in checkpoint.names if "/" in name), "")
    return {"name": name, "revision": checkpoint.revision} if name and checkpoint.revision else {}


def methods_tried(choice: Choice) -> list[str]:
    """Methods that had something to propose; "none" where none had."""
    named = dict.fromkeys(c.proposal.method for c in choice.candidates if c.proposal is not None)
    return list(named) or ["none"]


def tried(choice: Choice, *, by_worth: bool = False) -> dict[str, float]:
    """Accuracy on the choose split by what was tried, or what the choice was made by."""
    labels = [c.proposal.label if c.proposal is not None else "plain" for c in choice.candidates]
    values = [c.worth if by_worth else c.accuracy for c in choice.candidates]
    return {label: round(value, 4) for label, value in zip(labels, values, strict=True)}


def package_versions() -> dict[str, str]:
    """Of the packages that a search's numbers depend on."""
    return {
        "act-export": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _gain_notes(report: TaskReport) -> dict[str, Any]:
    """What stands in a calibration's provenance beside its accuracy."""
    assert report.own is not None  # only a set of heads has a gain
    assert report.beyond is not None
    assert report.with_remedy is not None
    control = {"control": report.control, "accuracy": report.controls[report.control]}
    notes: dict[str, Any] = {
        name: {**control, "gain": gain.gain, "interval_95": list(gain.interval)}
        for name, gain in (("gain_beyond_control", report.beyond), ("gain_with_remedy_on_both", report.with_remedy))
    }
    notes["gain_interval_95"] = list(report.own.interval)
    if report.own.p is not None:
        notes["mcnemar_p"] = report.own.p
    if report.predicted_shares is not None:
        plain, calibrated = report.predicted_shares
        notes["predicted_shares"] = {"plain": list(plain), "calibrated": list(calibrated)}
    for name, pair in (("measures", report.measures), ("invalid", report.invalid)):
        if pair is not None and pair[1] is not None:
            notes[name] = {"plain": asdict(pair[0]), "calibrated": asdict(pair[1])}
    controls: dict[str, Any] = {"random_heads": list(report.random_heads), "plain": dict(report.controls)}
    if report.choice_bias is not None:
        plain_unbiased, calibrated_unbiased = report.choice_bias
        controls["without_choice_bias"] = {"plain": plain_unbiased, "calibrated": calibrated_unbiased}
    if report.published:
        controls["published"] = dict(report.published)
    return {**notes, "controls": controls}
